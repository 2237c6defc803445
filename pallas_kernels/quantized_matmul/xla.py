"""The quantised matmul in plain XLA: the weight converted on the way into the dot, scales applied to the sums where a row has one.

An accelerator's compiler fuses the conversion into its matmul. A CPU's does not: it would write the whole weight out in x's dtype and
read it again; so there the weight goes through the dot in blocks of output channels that stay in a core's cache. Halves of bytes are not
put side by side on CPUs and TPUs: even inputs meet the low halves, odd ones the high ones, in two dots. int8 meets int8 in one dot of
integers where the platform has units for that and each row one scale.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32, Shaped, UInt8

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import accumulation_dtype, precision
from pallas_kernels.quantized_matmul.formats import PACKED, ZERO, Format, halves
from pallas_kernels.rounding import round_tokens


class Sizes(NamedTuple):
    """Output channels taken at a time."""

    outputs: int


class Weight(NamedTuple):
    """The arrays of a weight, each with a row for every output channel, and what makes numbers of its values."""

    values: Shaped[Array, "out stored"]
    scales: Float[Array, "out ins"]
    zeros: UInt8[Array, "out ins"] | None
    convert: Callable[[Array], Array] | None

    def rows(self, first: Int32[Array, ""], count: int) -> "Weight":
        """Some of the rows."""
        values, scales = (lax.dynamic_slice_in_dim(array, first, count) for array in self[:2])
        zeros = None if self.zeros is None else lax.dynamic_slice_in_dim(self.zeros, first, count)
        return Weight(values, scales, zeros, self.convert)


def heuristic(platform: str, key: dict[str, int | str]) -> dict[str, int]:
    """Sizes that were never measured."""
    features, outputs = int(key["in"]), int(key["out"])
    return Sizes(min(outputs, max(2**17 // features, 16)) if platform == "cpu" else outputs)._asdict()


def candidates(platform: str, key: dict[str, int | str]) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base, outputs = Sizes(**heuristic(platform, key)).outputs, int(key["out"])
    return [Sizes(size)._asdict() for size in sorted({base, max(base // 2, 1), min(2 * base, outputs), outputs})]


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "outs ins"],
    *,
    zeros: UInt8[Array, "outs ins"] | None = None,
    activations: str = "float",
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    kind, target = Format.of(weight, scales, activations), dispatch.target()
    whole = _whole(weight, scales, zeros, target.platform)
    final, inputs, per_token = jnp.dtype(x.dtype if out_dtype is None else out_dtype), x, None
    if activations == "int8":
        inputs, per_token = round_tokens(x)
        if kind.weight == "int8" and not kind.inputs and target.platform != "cpu":
            sums = lax.dot_general(inputs, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            if target.platform == "gpu":  # else XLA converts the sums in a kernel of its own, between the matmul and who uses them
                sums = lax.optimization_barrier(sums)
            return (sums.astype(jnp.float32) * per_token * whole.scales.astype(jnp.float32).T).astype(final)
        inputs = inputs.astype(x.dtype)  # whole numbers up to 127 are exact in every floating dtype

    def part(first: Int32[Array, ""], count: int) -> Float[Array, "tokens count"]:
        sums = _sums(inputs, whole.rows(first, count))
        return (sums if per_token is None else sums * per_token.astype(sums.dtype)).astype(final)

    block = Sizes(**tuning.sizes("quantized_matmul", "xla", target, kind.key(x, weight))).outputs
    return _in_blocks(part, x.shape[0], weight.shape[0], block)


def _whole(
    weight: Shaped[Array, "out stored"], scales: Float[Array, "outs ins"], zeros: UInt8[Array, "outs ins"] | None, platform: str
) -> Weight:
    """Bits are looked at where a compiler is slow: a CPU's converts all of an array of float8 before it cuts it, one number at a time; a
    GPU's multiplies in two kernels when it gets even and odd inputs apart.
    """
    repeat, convert = weight.shape[0] // scales.shape[0], None
    if weight.dtype == jnp.float8_e4m3fn and platform == "cpu":
        weight, convert = lax.bitcast_convert_type(weight, jnp.uint8), _float8
    if weight.dtype == PACKED and platform == "gpu":
        convert = partial(_interleaved, zero=ZERO if zeros is None else 0)
    return Weight(weight, jnp.repeat(scales, repeat, axis=0), None if zeros is None else jnp.repeat(zeros, repeat, axis=0), convert)


def _sums(x: Float[Array, "tokens in"], weight: Weight) -> Float[Array, "tokens out"]:
    """x times some rows of the weight, in the accumulation dtype."""
    wide, grouped = accumulation_dtype(x.dtype), weight.scales.shape[1] > 1
    centred = weight.zeros is None

    def dot(x: Float[Array, "tokens some"], values: Shaped[Array, "out some"]) -> Float[Array, "tokens out"]:
        """One dot with values that need no more than their scale, and a zero where there is one."""
        if grouped:
            split = values.astype(wide).reshape(*weight.scales.shape, -1)
            shifted = split if weight.zeros is None else split - weight.zeros.astype(wide)[..., None]
            values = (shifted * weight.scales.astype(wide)[..., None]).reshape(values.shape)
        elif weight.zeros is not None:
            values = values.astype(wide) - weight.zeros.astype(wide)
        return lax.dot_general(
            x, values.astype(x.dtype), (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=wide
        )

    if weight.convert is not None:
        sums = dot(x, weight.convert(weight.values))
    elif weight.values.dtype == PACKED:
        even, odd = (half.astype(jnp.int8) - jnp.int8(ZERO if centred else 0) for half in halves(weight.values))
        sums = dot(x[:, 0::2], even) + dot(x[:, 1::2], odd)
    else:
        sums = dot(x, weight.values)
    return sums if grouped else sums * weight.scales.astype(wide).T


def _interleaved(values: UInt8[Array, "out half"], *, zero: int) -> Int8[Array, "out in"]:
    """Both numbers of each byte side by side, less `zero` (0 or 8)."""
    signed = lax.bitcast_convert_type(values, jnp.int4).reshape(values.shape[0], -1)
    return (signed.astype(jnp.int8) & jnp.int8(15)) - jnp.int8(zero)


def _float8(values: UInt8[Array, "out in"]) -> Float32[Array, "out in"]:
    """float8_e4m3fn (no NaN) from its bits."""
    bits = values.astype(jnp.int32)
    size = bits & 0x7F
    normal = lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)  # exponents count from 7 and from 127
    magnitude = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(bits > 0x7F, -magnitude, magnitude)


def _in_blocks(part: Callable[[Array, int], Array], tokens: int, outputs: int, block: int) -> Float[Array, "tokens out"]:
    """part(first, count) gives the products of some output channels; all of them, `block` at a time."""
    if block >= outputs:
        return part(jnp.zeros((), jnp.int32), outputs)

    def step(index: Int32[Array, ""], out: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        return lax.dynamic_update_slice_in_dim(out, part(index * block, block), index * block, axis=1)

    full, rest = divmod(outputs, block)
    out = lax.fori_loop(jnp.int32(1), jnp.int32(full), step, jnp.pad(part(jnp.int32(0), block), ((0, 0), (0, outputs - block))))
    if not rest:
        return out
    return lax.dynamic_update_slice_in_dim(out, part(jnp.int32(full * block), rest), full * block, axis=1)
