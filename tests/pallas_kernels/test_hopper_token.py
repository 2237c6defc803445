"""How a token becomes the left side of products, and which numbers a thread holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from tests.pallas_kernels.quantized_matmul.test_gpu_convert import tiled

token = pytest.importorskip("pallas_kernels.hopper_token")
SIDES = [token.Limbs(), token.Same(jnp.bfloat16)]


def threads_of(layout, shape):
    """[registers, lanes, numbers of a register] of the first warp: which number of an array each holds, from jax's own description."""
    index = tiled(np.arange(np.prod(shape)).reshape(shape), layout)
    warps, lanes = ([index.ndim + dim for dim in dims] for dims in (layout.warp_dims, layout.partitioned_lane_dims))
    rest = [dim for dim in range(index.ndim) if dim not in (*warps, *lanes, index.ndim + layout.vector_dim)]
    order = index.transpose((*warps, *rest, *lanes, index.ndim + layout.vector_dim))
    return order.reshape(4, -1, 32, index.shape[layout.vector_dim])[0]


def test_threads_hold_what_limbs_are_loaded_for(interpreted):
    layouts = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")
    shape = layouts.WGMMA_LAYOUT_8BIT.registers_shape((64, 64))
    held = threads_of(layouts.WGMMA_LAYOUT_8BIT, (64, 64))
    for (_, part, *_), numbers in zip(np.ndindex(shape), held, strict=True):
        for lane in range(32):
            assert set(numbers[lane] // 64 % 4) == {lane // 4 % 4}
            assert list(numbers[lane] % 64) == [16 * part + 4 * (lane % 4) + element for element in range(4)]


def test_lanes_that_are_joined_hold_neighbouring_rows(interpreted):
    layouts = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")
    shape = layouts.WGMMA_LAYOUT.registers_shape((64, 32))
    held = threads_of(layouts.WGMMA_LAYOUT, (64, 32))
    first = [numbers for place, numbers in zip(np.ndindex(shape), held, strict=True) if not any(place[2:])]
    for part, numbers in enumerate(first):
        for lane in range(32):
            assert set(numbers[lane] // 32) == {lane // 4}
            assert list(numbers[lane] % 32) == [8 * part + 2 * (lane % 4) + element for element in range(2)]


@pytest.mark.parametrize("side", SIDES, ids=lambda side: type(side).__name__)
@pytest.mark.parametrize("inputs", [128, 640, 2048, 4224])
def test_what_is_put_is_taken_and_joined(interpreted, side, inputs):
    """A product with the unit matrix, block by block, gives the token back."""
    x = jnp.asarray(np.random.default_rng(inputs).standard_normal(inputs) * 3, jnp.bfloat16)

    def body(x, out, scratch):
        (room,) = scratch
        factor = side.put(token.pieces_of(x), room)
        for begin in range(0, inputs, 128):
            found = side.joined(side.taken(room, begin, 128).astype(side.sums)) * factor
            out.at[token.pl.ds(begin, 128)][...] = found

    result = jax.ShapeDtypeStruct((inputs,), jnp.float32)
    found = hopper.kernel(body, (side.room(inputs),), out_type=result, grid={"block": 1})(x)
    np.testing.assert_allclose(found, np.asarray(x, np.float32), rtol=0, atol=2.0**-22 * float(jnp.abs(x).max()))


def test_bytes_of_words(monkeypatch):
    """The instruction that chooses bytes, as PTX describes it, in its place."""

    def chosen(first, second, which):
        given = int(first).to_bytes(4, "little") + int(second).to_bytes(4, "little")
        return int.from_bytes(bytes(given[which >> 4 * digit & 7] for digit in range(4)), "little")

    monkeypatch.setattr(token, "_chosen", chosen)
    monkeypatch.setattr(token, "_less_128", lambda word: word ^ 0x80808080)
    rng = np.random.default_rng(0)
    shifted = rng.integers(0, 2**24, 8, dtype=np.int32)
    for limb, words in enumerate(token._bytes_of_four(list(shifted))):
        assert np.array_equal(np.array(words, np.uint32).view(np.int8), (shifted >> 8 * limb & 0xFF) - 128)


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [(128, [128]), (4096, [4096]), (14336, [2048] * 7), (896, [896]), (11008, [4096] * 2 + [2816]), (28672, [4096] * 7)],
)
def test_a_token_is_loaded_in_equal_pieces_and_a_rest(inputs, sizes):
    found = token.places_of(inputs)
    assert [place.size for place in found] == sizes and [place.start for place in found] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_limbs_hold_the_largest_token():
    assert 127 * (1 + 2**8 + 2**16) >= token.RANGE > 2**22 and 128 * 128 * token.MOST_INPUTS < 2**31
