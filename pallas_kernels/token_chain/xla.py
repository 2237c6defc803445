"""A chain in plain XLA: link by link, with XLA's own matmuls and norms."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.dense_matmul import xla as dense
from pallas_kernels.quantized_matmul import xla as quantized
from pallas_kernels.residual_norm import xla as norm_xla
from pallas_kernels.token_chain.reference import Form, gated


def token_chain(
    x: Float[Array, "1 in"],
    held: Float[Array, "1 features"],
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_ 1"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    meters: Int32[Array, "meters"],
) -> tuple[Array, ...]:
    """See api.token_chain; the counters go through as they are."""
    value, total = x, held
    for weight, scale, norm, form in zip(weights, scales, norms, forms, strict=True):
        if norm is not None:
            value, total = norm_xla.residual_norm(total, value, norm, epsilon=form.epsilon, offset=form.offset)
        if scale is None:
            value = dense.dense_matmul(value, weight, out_dtype=x.dtype)
        else:
            value = quantized.quantized_matmul(value, weight, scale, zeros=None, activations="float", out_dtype=x.dtype)
        value = gated(value) if form.gated else value
    return value, total, meters
