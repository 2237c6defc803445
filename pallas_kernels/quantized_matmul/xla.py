"""The quantised matmul in plain XLA: int8 converted on the way into the dot, scales applied to the sums.

An accelerator's compiler fuses the conversion into its matmul. A CPU's does not: it would write the whole weight out in x's dtype
and read it again; so there the weight goes through the dot in blocks of output channels that stay in a core's cache.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import accumulation_dtype, precision


class Sizes(NamedTuple):
    """Output channels taken at a time."""

    outputs: int


def tuning_key(x: Float[Array, "tokens in"], weight: Int8[Array, "out in"]) -> dict[str, int | str]:
    """What block sizes depend on."""
    return {"tokens": x.shape[0], "in": weight.shape[1], "out": weight.shape[0], "dtype": x.dtype.name}


def heuristic(platform: str, key: dict[str, int | str]) -> dict[str, int]:
    """Sizes that were never measured."""
    features, outputs = int(key["in"]), int(key["out"])
    return Sizes(min(outputs, max(2**17 // features, 16)) if platform == "cpu" else outputs)._asdict()


def candidates(platform: str, key: dict[str, int | str]) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base, outputs = Sizes(**heuristic(platform, key)).outputs, int(key["out"])
    return [Sizes(size)._asdict() for size in sorted({base, max(base // 2, 1), min(2 * base, outputs), outputs})]


def quantized_matmul(
    x: Float[Array, "tokens in"], weight: Int8[Array, "out in"], scales: Float[Array, "out"]
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    outputs = weight.shape[0]
    block = Sizes(**tuning.sizes("quantized_matmul", "xla", dispatch.target(), tuning_key(x, weight))).outputs
    wide, exact = accumulation_dtype(x.dtype), precision(x.dtype)

    def part(first: Int32[Array, ""], count: int) -> Float[Array, "tokens count"]:
        rows = lax.dynamic_slice_in_dim(weight, first, count).astype(x.dtype)
        sums = jnp.einsum("ti,oi->to", x, rows, precision=exact, preferred_element_type=wide)
        return (sums * lax.dynamic_slice_in_dim(scales, first, count).astype(wide)[None]).astype(x.dtype)

    if block >= outputs:
        return part(jnp.zeros((), jnp.int32), outputs)

    def step(index: Int32[Array, ""], out: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        return lax.dynamic_update_slice_in_dim(out, part(index * block, block), index * block, axis=1)

    full, rest = divmod(outputs, block)
    out = lax.fori_loop(jnp.int32(1), jnp.int32(full), step, jnp.pad(part(jnp.int32(0), block), ((0, 0), (0, outputs - block))))
    if not rest:
        return out
    return lax.dynamic_update_slice_in_dim(out, part(jnp.int32(full * block), rest), full * block, axis=1)
