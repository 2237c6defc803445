"""The order in which weights come out of registers (the kernel itself runs in test_gpu.py and in the contract test)."""

import jax.numpy as jnp
import numpy as np
import pytest

convert = pytest.importorskip("pallas_kernels.quantized_matmul.gpu_convert")


@pytest.mark.parametrize("bits", [8, 4])
def test_places_are_those_of_the_docstring(bits):
    found = np.asarray(convert.permute(jnp.arange(64.0)[None], bits))[0].astype(int)
    span = convert.SPANS[bits]
    for place, number in enumerate(found):
        tile, lane, element = place % span // 8, place % 8 // 2, place % 2
        inside = 4 * lane + 2 * tile + element if bits == 8 else 8 * lane + tile + 4 * element
        assert number == place // span * span + inside


def test_bits_of():
    assert [convert.bits_of(dtype) for dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.int4)] == [8, 8, 4]


def tiled(index, layout):
    """An array cut into a layout's tiles, outer dimensions first, as jax describes it."""
    for tile in layout.tiling.tiles:
        kept, cut = index.shape[: index.ndim - len(tile)], index.shape[index.ndim - len(tile) :]
        split = index.reshape(*kept, *(part for size, step in zip(cut, tile, strict=True) for part in (size // step, step)))
        first = len(kept)
        outer, inner = range(first, first + 2 * len(tile), 2), range(first + 1, first + 2 * len(tile), 2)
        index = split.transpose((*range(first), *outer, *inner))
    return index


def columns_of(layout):
    """Which column each (column register, lane, element) of the first row holds, from jax's own description of a layout."""
    span = layout.tiling.tiles[0][1]
    index = np.arange(64 * span).reshape(64, span) % span
    index = tiled(index, layout)
    lanes = [size for size in index.shape if size > 1][-2]
    return index.reshape(-1, 8, lanes, index.shape[-1])[0, 0]


@pytest.mark.parametrize("bits", [8, 4])
def test_places_are_those_of_the_layouts(bits):
    """Pairs go from the layout they are read in to wgmma's with the same thread holding them, as `_bytes` and `_halves` hand them over."""
    mgpu = pytest.importorskip("jax.experimental.mosaic.gpu")
    from jax.experimental.mosaic.gpu import fragmented_array as layouts

    read = columns_of(layouts.WGMMA_LAYOUT_8BIT if bits == 8 else mgpu.WGMMA_LAYOUT_UPCAST_4X)
    wanted = columns_of(mgpu.WGMMA_LAYOUT)
    order = np.asarray(convert.permute(jnp.arange(64.0)[None], bits))[0].astype(int)
    for lane in range(4):
        for tile in range(convert.SPANS[bits] // 8):
            for element in range(2):
                held = read[lane, 2 * tile + element if bits == 8 else tile + 4 * element]
                assert order[8 * tile + wanted[lane, element]] == held
