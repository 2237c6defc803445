"""Blocks are dealt out evenly, each to one worker; parts are counted and add up."""

import jax.numpy as jnp
import numpy as np
import pytest

stream = pytest.importorskip("pallas_kernels.hopper_stream")


@pytest.mark.parametrize(("tiles", "length", "workers"), [(112, 16, 132), (32, 32, 132), (3, 5, 15), (7, 1, 2), (1, 9, 4), (501, 8, 132)])
def test_every_block_has_one_owner_and_parts_are_counted(tiles, length, workers):
    deal = stream.Deal(tiles, length, workers)
    begins = np.asarray([int(deal.begin(jnp.int32(worker))) for worker in range(workers + 1)])
    owners = np.repeat(np.arange(workers), np.diff(begins))
    numbers = np.arange(deal.total)
    assert np.array_equal(owners, deal.owner(numbers)) and np.diff(begins).max() - np.diff(begins).min() <= 1
    assert np.array_equal(deal.parts(), [len(set(tile)) for tile in owners.reshape(tiles, length)])
    for tile, own in enumerate(owners.reshape(tiles, length)):
        found = [int(deal.part(jnp.int32(worker), jnp.int32(tile))) for worker in dict.fromkeys(own.tolist())]
        assert found == list(range(len(found)))
    number = jnp.int32(deal.total - 1)
    assert (int(deal.tile(number)), int(deal.place(number))) == (tiles - 1, length - 1)


def test_parts_that_nobody_has_are_not_added():
    deal = stream.Deal(2, 3, 2)  # tile 0: worker 0; tile 1: worker 1; one part each
    parts = jnp.stack([jnp.ones((1, 4)), jnp.full((1, 4), jnp.nan)])
    assert np.array_equal(stream.add_up(parts, deal), np.ones((1, 4)))
    assert np.array_equal(stream.add_up(jnp.ones((2, 1, 6)), stream.Deal(3, 1, 2)), np.ones((1, 6)))
    assert np.array_equal(stream.add_up(jnp.ones((2, 1, 3)), stream.Deal(3, 2, 4)), [[2, 2, 1]])
