"""One token through matmuls that follow one another, norms of the residual stream between them: signature, checks, choice.

What a layer does behind its attention, and the first matmul of the next layer, is such a chain. As separate kernels each waits for the one
before to end; in one kernel the next weight is on its way by then.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape
from pallas_kernels.token_chain.reference import Form

OP = "token_chain"


class Chained(NamedTuple):
    """What the last matmul gives, and the residual stream with everything added but that."""

    out: Float[Array, "1 out"]
    total: Float[Array, "1 features"]


def token_chain(
    x: Float[Array, "1 in"],
    held: Float[Array, "1 features"],
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_ 1"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    counters: Any = None,
    implementation: str = "auto",
) -> Chained:
    """For each link: where it has a norm, what there is so far is added to the residual stream `held`, and the sum's root mean square norm
    goes on; then comes the matmul, y = x @ (weight * scales).T (scales None: a weight of x's dtype, else int8); where the form is gated,
    silu of y's first half times its second half. Sums are float32, every result is rounded to x's dtype.

    counters: the program's, see `hopper_counters`; None: chains of this program must not run at the same time by themselves. Raises
    ValueError when shapes or dtypes do not fit.
    """
    check(x, held, weights, scales, norms, forms)
    module = dispatch.resolve(OP, implementation, dispatch.target(), key_of(x, weights, scales))
    return Chained(*module.token_chain(x, held, weights, scales, norms, forms=forms, counters=counters))


def one_kernel(x: Array, weights: Sequence[Array], scales: Sequence[Array | None], implementation: str) -> bool:
    """Whether these links would be one kernel, and not one after another all the same."""
    target, known = dispatch.target(), key_of(x, weights, scales)
    if implementation == "auto":
        return target.platform == "gpu" and dispatch.choose(OP, implementation, target, known) == "gpu"
    return implementation == "gpu" and dispatch.refusal(OP, implementation, target, known) is None


def key_of(x: Array, weights: Sequence[Array], scales: Sequence[Array | None]) -> dispatch.Key:
    """What there is to know of a call: "weight" is "mixed" where not all links are alike."""
    kinds = {weight.dtype.name for weight in weights} | {"scaled" if scale is not None else "plain" for scale in scales}
    kind = weights[0].dtype.name if len(kinds) == 2 else "mixed"
    shapes: dispatch.Key = {
        f"{name}{number}": size for number, w in enumerate(weights) for name, size in zip(("out", "in"), w.shape, strict=True)
    }
    return {"tokens": x.shape[0], "dtype": x.dtype.name, "weight": kind, "links": len(weights)} | shapes


def check(
    x: Array, held: Array, weights: Sequence[Array], scales: Sequence[Array | None], norms: Sequence[Array | None], forms: Sequence[Form]
) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2 and x.shape[0] == 1, OP, f"x is {describe(x)}", "it must have shape [1, in]: a chain takes one token")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(held.ndim == 2 and held.shape[0] == 1, OP, f"held is {describe(held)}", "it must have shape [1, features]")
    require_dtype(OP, "held", held, x.dtype, "that of x")
    counts = {len(weights), len(scales), len(norms), len(forms)}
    require(
        len(counts) == 1 and counts != {0},
        OP,
        f"there are {sorted(counts)} weights, scales, norms, forms",
        "one of each is wanted for a link",
    )
    width = x.shape[1]
    for number, (weight, scale, norm, form) in enumerate(zip(weights, scales, norms, forms, strict=True)):
        if norm is not None:
            require(width == held.shape[1], OP, f"link {number} adds {width} numbers", f"the residual stream has {held.shape[1]}")
            require_shape(OP, f"norms[{number}]", norm, (width,), "features")
            require_dtype(OP, f"norms[{number}]", norm, x.dtype, "that of x")
        require(weight.ndim == 2, OP, f"weights[{number}] is {describe(weight)}", "it must have shape [out, in]")
        require_shape(OP, f"weights[{number}]", weight, (weight.shape[0], width), "out, in: what the link before gives")
        if scale is None:
            require_dtype(OP, f"weights[{number}]", weight, x.dtype, "that of x, where there are no scales")
        else:
            require_dtype(OP, f"weights[{number}]", weight, jnp.int8, "int8, where there are scales")
            require_shape(OP, f"scales[{number}]", scale, (weight.shape[0], 1), "out, 1")
        even = not form.gated or weight.shape[0] % 2 == 0
        require(even, OP, f"weights[{number}] is {describe(weight)}", "a gated link has two equal halves")
        width = weight.shape[0] // (2 if form.gated else 1)
