"""Ids of pages laid out for launches; what the programs do with them is tested in test_program.py."""

import numpy as np

from jaxinfer.step.pages import AT_ONCE, blocks


def test_each_replica_fills_its_own_line():
    ((sources, targets),) = blocks([(0, 1, 2), (1, 3, 4), (0, 5, 6)], replicas=2, columns=2)
    assert sources.shape == targets.shape == (2, AT_ONCE)
    np.testing.assert_array_equal(sources[:, :3], [[1, 5, 0], [3, 0, 0]])
    np.testing.assert_array_equal(targets[:, :3], [[2, 6, 0], [4, 0, 0]])
    assert not sources[:, 3:].any()


def test_more_than_fit_take_more_launches():
    launches = blocks([(0, page) for page in range(1, AT_ONCE + 3)], replicas=1, columns=1)
    assert [int((ids > 0).sum()) for (ids,) in launches] == [AT_ONCE, 2]
    assert blocks([], replicas=3, columns=2) == []
