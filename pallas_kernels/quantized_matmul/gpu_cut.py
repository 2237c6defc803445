"""Tokens become limbs (`hopper_limbs`), two int8 numbers for each input, on Hopper GPUs: one size for a whole token.

x = (limb 0 + 2^8 limb 1) * size: an input is off by less than a 65,000th of the token's largest, or of 2^-100 if that is larger. A token
with an infinity or NaN has a size of NaN. One warpgroup has a token in registers, so it is read once; XLA reads it twice, in two kernels.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels import hopper, hopper_token
from pallas_kernels.hopper_limbs import LEAST, LIMBS, RANGE, SHIFT
from pallas_kernels.hopper_token import OWN, THREADS


class Cut(NamedTuple):
    """Limbs of each token, the lower one first, as rows, and what a unit of each token is worth; up to a multiple of 8 tokens, and those
    that are not there hold anything."""

    limbs: Int8[Array, "limbs in"]
    sizes: Float32[Array, "tokens"]


def cut(x: Float[Array, "tokens in"]) -> Cut:
    """Tokens of a multiple of 128 inputs in limbs."""
    return _cut(x, interpreted=hopper.interpreting())


@partial(jax.jit, static_argnames=("interpreted",))
def _cut(x: Float[Array, "tokens in"], *, interpreted: bool) -> Cut:
    """interpreted only keeps traces for the interpreter apart."""
    tokens, inputs = x.shape
    padded = tokens + -tokens % 8
    made = (jax.ShapeDtypeStruct((LIMBS * padded, inputs), jnp.int8), jax.ShapeDtypeStruct((padded,), jnp.float32))
    return Cut(*hopper.kernel(_body, (), out_type=made, grid={"token": tokens})(x))


def _body(x: Any, limbs: Any, sizes: Any, _: tuple[()]) -> None:
    token = lax.axis_index("token")
    pieces = hopper_token.pieces_of(x.at[token])
    wide = [piece.values.astype(jnp.float32) for piece in pieces]
    top = hopper_token.together(jnp.maximum, jnp.max, [jnp.abs(values) for values in wide])
    largest = jnp.maximum(top, LEAST)
    for piece, values in zip(pieces, wide, strict=True):
        bits = lax.bitcast_convert_type(values * (RANGE / largest) + SHIFT, jnp.int32)
        limbs.at[LIMBS * token, piece.place][...] = (bits ^ 0x80).astype(jnp.int8)
        limbs.at[LIMBS * token + 1, piece.place][...] = (bits >> 8).astype(jnp.int8)
    size = jnp.where(top < jnp.inf, largest * (1.0 / RANGE), jnp.nan)
    hopper_token.leave(sizes.at[pl.ds(token, 1)], plgpu.layout_cast(jnp.full((THREADS,), size, jnp.float32), OWN))
