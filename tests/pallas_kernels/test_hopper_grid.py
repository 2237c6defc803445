"""Sums taken up in the order in which results are written (the chain's tests run it; a card showed the threads' places)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper_token import Fold

grids = pytest.importorskip("pallas_kernels.hopper_grid")
Grid = grids.Grid


@pytest.mark.parametrize(("parts", "first", "rows"), [(1, 0, 64), (2, 0, 32), (2, 16, 16), (4, 0, 16), (4, 8, 8)])
def test_parts_meet_where_a_weights_part_met_the_same_of_the_tokens(parts, first, rows):
    sums = np.random.default_rng(0).standard_normal((parts * 16, 64)).astype(np.float32)
    with hopper.interpreted():
        found = grids.met(Fold(1024, parts, 128), Grid(16, rows), jnp.asarray(sums), first)
    size = 64 // parts
    for token, row in np.ndindex(16, rows):
        wanted = sum(sums[part * 16 + token, part * size + first + row] for part in range(parts))
        assert found[token * rows + row] == pytest.approx(wanted, abs=1e-6)


def test_numbers_of_a_token_or_of_a_row_are_spread(monkeypatch):
    grid, values = Grid(8, 16), np.arange(128.0).reshape(8, 16)
    with hopper.interpreted():
        assert np.array_equal(grid.load(jnp.asarray(values)), values.ravel())
        assert np.array_equal(grid.load(jnp.arange(16.0), (1, 0)), np.repeat(np.arange(8.0), 16))
        assert np.array_equal(grid.load(jnp.arange(16.0), (0, 1)), np.tile(np.arange(16.0), 8))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")
def test_threads_have_places_of_their_own():
    grid, shaped = Grid(16, 32), jax.ShapeDtypeStruct

    def body(given, out, sums, scratch):
        values = grid.load(given)
        grid.store(out, values)
        grid.store_sums(sums, values)

    out = (shaped((16, 32), jnp.float32), shaped((16,), jnp.float32))
    run = hopper.kernel(body, (), out_type=out, grid={"block": 1})
    traced = str(jax.make_jaxpr(run)(shaped((16, 32), jnp.float32)))
    assert traced.count("Grid.load.<locals>.load") == 1 and traced.count("Grid.store.<locals>.store") == 1
    assert traced.count("Grid.store_sums.<locals>.store") == 1
