"""Every token of every text is in one place, and a step's rows depend on its number alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.train.rows import Text, batch, length_for, pack


@given(sizes=st.lists(st.integers(2, 20), min_size=1, max_size=30), multiple=st.integers(1, 4))
def test_texts_are_whole_and_in_order(sizes, multiple):
    warmth = (None, 0.0, 0.9)
    texts = [
        Text(tuple(range(100 * number, 100 * number + size)), 1 + number % (size - 1), warmth[number % 3])
        for number, size in enumerate(sizes)
    ]
    rows = pack(texts, 20, multiple)
    assert len(rows.tokens) % multiple == 0 and rows.tokens.shape[1] == 20
    for number, text in enumerate(texts):
        own = rows.owner == number
        assert tuple(rows.tokens[own]) == text.tokens and list(rows.positions[own]) == list(range(len(text.tokens)))
        assert list(rows.learned[own]) == [text.first - 1 <= at < len(text.tokens) - 1 for at in range(len(text.tokens))]
        assert (rows.temperature[own] == text.compared_at).all()
    free = rows.owner < 0
    assert (rows.positions[free] == -1).all() and not rows.learned[free].any()
    assert ((rows.positions >= 0).cumprod(axis=1) == (rows.positions >= 0)).all(), "padding is at the end"


def test_little_is_padding():
    texts = [Text(tuple(range(size)), 1) for size in (9, 7, 5, 5, 4, 2)]
    assert len(pack(texts, 16).tokens) == 2
    assert length_for(texts, 3) == 32 and length_for(texts, 33) == 64


def test_an_epoch_has_every_row_once_and_steps_are_repeatable():
    rows = pack([Text((number, 1), 1) for number in range(6)], 2)
    first = [batch(rows, 3, step, 5) for step in range(4)]
    for epoch in (first[:2], first[2:]):
        assert sorted(int(token) for part in epoch for token in part.tokens[:, 0]) == list(range(6))
    assert np.array_equal(batch(rows, 3, 3, 5).tokens, first[3].tokens)
    assert not all(np.array_equal(batch(rows, 6, 0, seed).tokens, batch(rows, 6, 0, 0).tokens) for seed in (1, 2, 3))
