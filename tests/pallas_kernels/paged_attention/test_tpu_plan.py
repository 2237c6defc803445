from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.tpu_plan import FIELDS, Rows, items, room


def by_hand(starts, lengths, positions, tokens, block, page_size, window):
    """(block, row) pairs and what they see."""
    found = []
    for row, (start, length, position) in enumerate(zip(starts, lengths, positions, strict=True)):
        for number in range(-(-tokens // block)):
            begin, end = max(start, number * block), min(start + length, (number + 1) * block)
            if begin < end:
                first, stop = position + begin - start, position + end - start
                page = 0 if window is None else max(first - window + 1, 0) // page_size
                found.append((number, row, begin - number * block, end - number * block, page, -(-stop // page_size) - page, stop))
    return found


@pytest.mark.parametrize("window", [None, 20])
def test_items_are_all_pairs_in_order(window):
    rng = np.random.default_rng(0)
    make = jax.jit(partial(items, tokens=170, block=16, page_size=8, window=window, cores=2))
    for _ in range(8):
        lengths = rng.integers(0, 34, 5) * (rng.random(5) < 0.8)
        starts, positions = np.cumsum(lengths) - lengths, rng.integers(0, 50, 5)
        tokens = 170
        rows = Rows(*(jnp.asarray(x.astype(np.int32)) for x in (starts, lengths, positions, positions + lengths)))
        made = make(rows)
        wanted = by_hand(starts, lengths, positions, tokens, 16, 8, window)
        begin, middle, total = np.asarray(made.bounds).tolist()
        assert (begin, total) == (0, len(wanted)) and total <= room(tokens, 16, 5)
        table = np.asarray(made.fields).reshape(-1, len(FIELDS))[:total]
        assert room(tokens, 16, 5) * len(FIELDS) == made.fields.size
        named = {name: table[:, FIELDS.index(name)] for name in FIELDS}
        assert [tuple(row) for row in table[:, [0, 1, 2, 3, 5, 6, 7]].tolist()] == wanted
        numbers = named["block"].tolist()
        assert named["fresh"].tolist() == [index == 0 or numbers[index - 1] != number for index, number in enumerate(numbers)]
        assert named["final"].tolist() == [[*numbers, -1][index + 1] != number for index, number in enumerate(numbers)]
        assert named["ordinal"].tolist() == [sorted(set(numbers)).index(number) for number in numbers]
        for index, following in enumerate(named["next"].tolist()):
            later = [other for other in range(index + 1, total) if numbers[other] != numbers[index]]
            assert following == later[0] if later else following >= total
        assert middle == total or named["fresh"][middle] == 1


def test_decode_rows_have_one_item_each():
    assert room(12, 3, 4) == 4
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in ([0, 3, 6, 9], [3, 0, 1, 2], [5, 0, 0, 7], [8, 0, 1, 9])))
    made = jax.jit(partial(items, tokens=12, block=3, page_size=4, window=None, cores=1))(rows)
    table = np.asarray(made.fields).reshape(-1, len(FIELDS))
    assert np.asarray(made.bounds).tolist() == [0, 3]
    assert table[:3, :5].tolist() == [[0, 0, 0, 3, 5], [2, 2, 0, 1, 0], [3, 3, 0, 2, 7]]
