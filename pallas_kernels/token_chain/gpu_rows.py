"""A chain of matmuls of int8 numbers on Hopper GPUs: the vendor's kernels for the matmuls, one of Pallas Mosaic GPU between two of them.

That kernel gives a warpgroup to each token, whose numbers stay in its registers from the sums that come to the int8 numbers that go: it
scales the sums, gates them or adds them to the residual stream and norms that, finds the largest number and rounds. So a token depends on
nothing else, and everything is read and written once. XLA (seen with jax 0.11.2) makes two to four passes of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from pallas_kernels import dispatch, hopper
from pallas_kernels.hopper_token import SHIFT, THREADS, strided, together
from pallas_kernels.rounding import LIMIT
from pallas_kernels.token_chain.reference import Form, Weight, gated

WIDEST = 16384  # numbers of a token that fit the registers
PIECES = (2048, 1024)  # numbers that are brought in at a time
TINY = float(jnp.finfo(jnp.float32).tiny)


class Sizes(NamedTuple):
    """Numbers of a token that are brought in at a time, at most."""

    piece: int


class Row(NamedTuple):
    """What is static of the way of one token from sums (or numbers, if not `sums`) to int8. width: numbers that are rounded; epsilon: of
    the norm, if there is one; offset: what is added to its weight."""

    width: int
    piece: int
    dtype: Any
    sums: bool
    gated: bool
    epsilon: float | None
    offset: float
    smooth: bool

    @property
    def layout(self) -> Any:
        """Of a piece in registers."""
        return strided(self.piece)

    @property
    def pieces(self) -> list[int]:
        """Where each begins."""
        return list(range(0, self.width, self.piece))


class Sums(NamedTuple):
    """What a matmul of int8 numbers gives, and what its rows and its columns are to be multiplied by."""

    sums: Int32[Array, "tokens out"]
    tokens: Float32[Array, "tokens lanes"]
    channels: Float32[Array, "out"]


class Rounded(NamedTuple):
    """A token's numbers as int8, its scale (the same in each lane), and the residual stream that it was added to."""

    values: Int8[Array, "tokens in"]
    scales: Float32[Array, "tokens lanes"]
    total: Float[Array, "tokens features"]


def refusal(key: dispatch.Key) -> str | None:
    """Why a Hopper GPU cannot run this for what is known of a key; None when it can."""
    for number in range(int(key.get("links", 0))):
        width = int(key[f"in{number}"])
        if width % THREADS or width > WIDEST:
            return f"its kernel between int8 matmuls takes inputs in multiples of {THREADS} up to {WIDEST}, not {width}"
    return None


def run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    sizes: Sizes,
) -> tuple[Array, Array]:
    """A chain of some tokens; see api.token_chain."""
    value: Any = x
    total, before = held, False
    for (values, scales, smooth), norm, form in zip(weights, norms, forms, strict=True):
        width = values.shape[1]
        piece = max(size for size in range(THREADS, sizes.piece + 1, THREADS) if width % size == 0)
        epsilon, offset = (None, 0.0) if norm is None else (form.epsilon, form.offset)
        row = Row(width, piece, x.dtype, isinstance(value, Sums), before, epsilon, offset, smooth is not None)
        rounded = _rounded(value, total, norm, smooth, row=row, interpreted=hopper.interpreting())
        sums = lax.dot_general(rounded.values, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        channels = jnp.asarray(scales, jnp.float32).reshape(-1)
        value, total, before = Sums(sums, rounded.scales, channels), rounded.total, form.gated
    return _scaled(value, x.dtype, gate=before), total


def _scaled(value: Sums, dtype: Any, *, gate: bool) -> Float[Array, "tokens out"]:
    """What the last matmul gives; whoever uses it computes it, not a pass of its own."""
    sums = lax.optimization_barrier(value.sums)  # else XLA converts them in a kernel of its own, between the matmul and who uses them
    found = (sums.astype(jnp.float32) * value.tokens[:, :1] * value.channels[None]).astype(dtype)
    return gated(found) if gate else found


@partial(jax.jit, static_argnames=("row", "interpreted"))
def _rounded(
    value: Float[Array, "tokens width"] | Sums,
    held: Float[Array, "tokens features"],
    norm: Float[Array, "width"] | None,
    smooth: Float[Array, "width"] | None,
    *,
    row: Row,
    interpreted: bool,
) -> Rounded:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    tokens = held.shape[0]
    out = [jax.ShapeDtypeStruct((tokens, row.width), jnp.int8), jax.ShapeDtypeStruct((tokens, THREADS), jnp.float32)]
    given = [*value] if isinstance(value, Sums) else [value]
    if norm is not None:
        given += [held, norm]
        out.append(jax.ShapeDtypeStruct(held.shape, held.dtype))
    run = plgpu.kernel(
        hopper.named(partial(_body, row), __name__),
        out_type=tuple(out),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=hopper.REDUCTION_BYTES),
        interpret=hopper.interpretation(),
    )
    values, scales, *total = run(*given, *([] if smooth is None else [smooth]))
    return Rounded(values, scales, total[0] if total else held)


def _body(row: Row, *refs: Any) -> None:
    """refs: sums with their scales, or numbers; stream and weight of the norm; smooth; what is written."""
    token, rest = lax.axis_index("token"), list(refs)
    numbers = _from_sums(row, token, *(rest.pop(0) for _ in range(3))) if row.sums else _from_numbers(row, token, rest.pop(0))
    if row.epsilon is not None:
        held, weight = rest.pop(0), rest.pop(0)
        pieces = _normed(row, token, numbers, held, weight, rest.pop())
    else:
        pieces = [numbers(begin) for begin in row.pieces]
    if row.smooth:
        smooth = rest.pop(0)
        factors = (hopper.load(smooth.at[pl.ds(begin, row.piece)], row.layout) for begin in row.pieces)
        pieces = [piece * factor.astype(row.dtype) for piece, factor in zip(pieces, factors, strict=True)]
    _round(row, token, pieces, *rest)


def _from_numbers(row: Row, token: Any, x: Any) -> Callable[[int], Any]:
    """Pieces as they come."""
    return lambda begin: hopper.load(x.at[token, pl.ds(begin, row.piece)], row.layout)


def _from_sums(row: Row, token: Any, sums: Any, tokens: Any, channels: Any) -> Callable[[int], Any]:
    """Pieces of sums, scaled, of gated ones gate and up together."""
    scale = tokens[token, 0]

    def scaled(begin: int) -> Any:
        found = hopper.load(sums.at[token, pl.ds(begin, row.piece)], row.layout).astype(jnp.float32) * scale
        return (found * hopper.load(channels.at[pl.ds(begin, row.piece)], row.layout)).astype(row.dtype)

    def both(begin: int) -> Any:
        gate, up = (scaled(begin + half).astype(jnp.float32) for half in (0, row.width))
        return (gate / (1.0 + jnp.exp(-gate)) * up).astype(row.dtype)

    return both if row.gated else scaled


def _normed(row: Row, token: Any, numbers: Callable[[int], Any], held: Any, weight: Any, total: Any) -> list[Any]:
    """Add pieces to the residual stream and norm them."""
    sums = []
    for begin in row.pieces:
        place = pl.ds(begin, row.piece)
        found = hopper.load(held.at[token, place], row.layout) + numbers(begin)
        total[token, place] = found
        sums.append(found)
    wide = [found.astype(jnp.float32) for found in sums]
    squares = together(jnp.add, jnp.sum, [values * values for values in wide])
    factor, normed = lax.rsqrt(squares * (1.0 / row.width) + row.epsilon), []
    for begin, values in zip(row.pieces, wide, strict=True):
        weights, scaled = hopper.load(weight.at[pl.ds(begin, row.piece)], row.layout), values * factor
        if row.offset:
            normed.append((scaled * (weights.astype(jnp.float32) + row.offset)).astype(row.dtype))
        else:
            normed.append(scaled.astype(row.dtype) * weights)
    return normed


def _round(row: Row, token: Any, pieces: list[Any], values: Any, scales: Any) -> None:
    """Pieces to int8, as `rounding.round_tokens` does it, but for ties: they are multiplied by the scale's reciprocal."""
    wide = [piece.astype(jnp.float32) for piece in pieces]
    largest = together(jnp.maximum, jnp.max, [jnp.abs(values) for values in wide])
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(largest / LIMIT, TINY))  # NaN is not 0
    for begin, numbers in zip(row.pieces, wide, strict=True):
        shifted = numbers * (1.0 / scale) + SHIFT
        values[token, pl.ds(begin, row.piece)] = lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)
    scales[token] = plgpu.layout_cast(jnp.full((THREADS,), scale), strided(THREADS))
