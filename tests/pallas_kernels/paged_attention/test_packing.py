import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import packing
from pallas_kernels.paged_attention.cases import Case

CASE = Case("x", decode_rows=3, prefill_rows=2, prefill_tokens=9, page_size=4, pages_per_row=5, head_dim=8, decode_tokens=2)


def test_lines_of_rows_and_back():
    q = jnp.arange(6 * 2 * 3 * 4).reshape(6, 2, 3, 4).astype(jnp.float32)
    lines = packing.by_row(q, 3)
    assert lines.shape == (3, 2, 6, 4)
    assert np.array_equal(lines[1, 0, 3:6], q[3, 0]), "the second token's group follows the first's"
    assert np.array_equal(packing.by_token(lines, q.shape), q)


def test_tokens_know_their_rows_and_what_they_see():
    for seed in range(5):
        inputs = CASE.make(seed)
        metadata, positions = inputs["metadata"], np.asarray(inputs["positions"])
        rows = np.asarray(packing.row_of_token(metadata, len(positions)))
        for row, (start, length) in enumerate(zip(np.asarray(metadata.query_starts), np.asarray(metadata.query_lengths), strict=True)):
            assert (rows[start : start + length] == row).all()
        stops, stop = packing.keys_seen(inputs["positions"][:6], metadata)
        assert np.array_equal(np.asarray(stops).reshape(-1), positions[:6] + 1)
        assert np.array_equal(stop, metadata.kv_lengths[:3])


def test_blocks_hold_each_prefill_token_once():
    inputs = CASE.make(1)
    positions = inputs["positions"][6:]
    blocks = packing.cut(inputs["metadata"], positions, 4, 2)
    held = np.asarray(blocks.token)[np.asarray(blocks.position) >= 0]
    assert sorted(held.tolist()) == np.flatnonzero(np.asarray(positions) >= 0).tolist()
    assert np.array_equal(np.asarray(blocks.position).reshape(-1)[np.asarray(blocks.place)[held]], np.asarray(positions)[held])


def test_the_key_names_codes_only_where_there_are_some():
    inputs = CASE.make(0)
    assert packing.tuning_key(inputs["kv"], inputs["q"]) == CASE.tuning_key()
    quantized = dataclasses.replace(CASE, kv_dtype="int8")
    assert packing.tuning_key(quantized.make(0)["kv"], inputs["q"]) == quantized.tuning_key() == CASE.tuning_key() | {"kv_dtype": "int8"}
