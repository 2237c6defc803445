"""Packing and unpacking: what a batch says is what the program sees, and padding is what it should be."""

from array import array

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.batch import LAST_SAMPLED, Batch, Row
from jaxinfer.cache.pages import GUARD_PAGE
from jaxinfer.request import Request
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.inputs import PADDING_POSITION, Shapes, pack, unpack
from tests.counting import work

SHAPES = Shapes(Bucket(prefill_tokens=8, prefill_rows=2, decode_rows=3), replicas=2, pages_per_row=4, page_size=4, spare_slot=10)


def row(slot, start, tokens, pages, *, samples=True, replica=0):
    return Row(Request(str(slot), (1,)), slot, start, tokens, pages, samples, replica)


DECODES = (row(0, 5, (LAST_SAMPLED,), (3, 1)), row(6, 0, (42,), (2,), replica=1), row(2, 9, (LAST_SAMPLED,), (4, 6, 5)))
PREFILLS = (
    row(7, 4, (50, 51, 52), (9, 8), samples=False, replica=1),
    row(1, 0, (60, 61), (7,)),
    row(5, 0, (70, 71, 72, 73), (1,), replica=1),
)
BATCH = Batch(DECODES, PREFILLS)


def seen(batch=BATCH, shapes=SHAPES):
    packed = pack(batch, shapes)
    inputs = unpack(jnp.asarray(packed.buffer), shapes)
    return packed, {name: np.asarray(getattr(inputs, name)) for name in shapes.fields()}


def test_rows_stand_where_the_program_expects_them():
    packed, _ = seen()
    assert [(index, row.slot) for index, row in packed.rows] == [(0, 0), (5, 6), (1, 2), (8, 7), (3, 1), (9, 5)]


def test_the_program_sees_each_row_as_the_batch_says():
    packed, arrays = seen()
    tokens = arrays["tokens"].reshape(2, -1)
    positions = arrays["positions"].reshape(2, -1)
    for index, row in packed.rows:
        replica, count = index // SHAPES.bucket.rows, len(row.tokens)
        assert replica == row.replica
        start = arrays["query_starts"][index]
        assert tuple(tokens[replica, start : start + count]) == row.tokens
        assert tuple(positions[replica, start : start + count]) == tuple(range(row.start, row.start + count))
        assert tuple(arrays["page_tables"][index]) == row.pages + (GUARD_PAGE,) * (4 - len(row.pages))
        assert arrays["query_lengths"][index] == count
        assert arrays["kv_lengths"][index] == row.kv_length
        assert arrays["slots"][index] == row.slot
        assert arrays["samples"][index] == row.samples


def test_decode_rows_own_the_token_of_their_own_index():
    packed, arrays = seen()
    for index, row in packed.rows:
        if row in DECODES:
            assert arrays["query_starts"][index] == index % SHAPES.bucket.rows < SHAPES.bucket.decode_rows


def test_everything_else_is_padding():
    packed, arrays = seen()
    used = [index for index, _ in packed.rows]
    empty = [index for index in range(2 * SHAPES.bucket.rows) if index not in used]
    assert len(empty) == 4
    for name in ("query_lengths", "kv_lengths", "samples"):
        assert not arrays[name][empty].any()
    assert (arrays["slots"][empty] == SHAPES.spare_slot).all()
    assert (arrays["page_tables"][empty] == GUARD_PAGE).all()
    assert (arrays["positions"] != PADDING_POSITION).sum() == BATCH.tokens
    assert (arrays["page_tables"] >= 0).all()


def test_an_empty_batch_is_all_padding():
    _, arrays = seen(Batch((), ()))
    assert (arrays["positions"] == PADDING_POSITION).all()
    assert not arrays["samples"].any()


def test_every_step_gets_a_fresh_buffer_of_one_shape():
    first, second = pack(BATCH, SHAPES), pack(BATCH, SHAPES)
    assert not np.shares_memory(first.buffer, second.buffer)
    assert first.buffer.shape == SHAPES.buffer
    assert first.buffer.dtype == np.int32
    np.testing.assert_array_equal(first.buffer, second.buffer)


@pytest.mark.parametrize("pages", [(), (1,), (1, GUARD_PAGE), (GUARD_PAGE, 1), range(1, 2 + SHAPES.pages_per_row)])
def test_a_row_without_its_pages_is_refused(pages):
    """Too many would be written over the pages of the row behind."""
    with pytest.raises(ValueError, match="too few, too many, or the guard page"):
        pack(Batch((row(0, 4, (1,), pages),), ()), SHAPES)


def test_the_work_of_packing_does_not_grow_with_a_rows_tokens():
    shapes = Shapes(Bucket(2048, 2, 0), replicas=1, pages_per_row=64, page_size=64, spare_slot=10)
    long, short = (Batch((), (row(0, 0, array("i", range(count)), array("i", range(1, 33))),)) for count in (2048, 8))
    pack(short, shapes)  # the layout is made once
    assert abs(work(lambda: pack(long, shapes)) - work(lambda: pack(short, shapes))) < 50


def test_inputs_pass_through_jit():
    packed = pack(BATCH, SHAPES)
    inputs = jax.jit(unpack, static_argnums=1)(packed.buffer, SHAPES)
    np.testing.assert_array_equal(inputs.kv_lengths, unpack(jnp.asarray(packed.buffer), SHAPES).kv_lengths)
