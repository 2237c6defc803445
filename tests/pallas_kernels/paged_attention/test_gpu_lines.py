import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.hopper_tiles import LINES
from pallas_kernels.paged_attention import gpu_lines
from pallas_kernels.paged_attention.cases import Case

MIXED = Case("mixed", 3, 3, 70, page_size=16, pages_per_row=12, group=3, dtype="bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_tokens": 3},
        *(
            pytest.param(changes, marks=pytest.mark.ci)
            for changes in ({}, {"decode_rows": 0}, {"prefill_rows": 0, "prefill_tokens": 0}, {"decode_tokens": 8, "group": 16})
        ),
    ],
)
def test_each_query_lies_where_its_line_says(changes):
    """Rotated, alone on its lines, and outputs that lie there find back to their tokens."""
    case = dataclasses.replace(MIXED, **changes)
    inputs = case.make(1)
    positions, metadata, q = inputs["positions"], inputs["metadata"], inputs["q"]
    lines = gpu_lines.layout(positions, metadata, case.group)
    given = [inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")]
    placed = gpu_lines.place(*given, lines=lines, spec=case.spec, rope=inputs["rope"])
    assert placed.q.shape == (case.kv_heads, lines.room, case.head_dim)
    line, real = np.asarray(lines.line), np.asarray(positions) >= 0
    assert (line[~real] == gpu_lines.NOWHERE).all() and real.any()
    covered = line[real][:, None] + np.arange(case.group)
    assert len(np.unique(covered)) == covered.size and covered.max() < lines.room
    wanted = attention.rotate(q, attention.rope_table(positions, inputs["rope"], case.spec.rope_scale))
    wanted = np.asarray(wanted, np.float32).reshape(len(line), case.kv_heads, case.group, -1)
    found = np.asarray(placed.q, np.float32)[:, covered].transpose(1, 0, 2, 3)
    np.testing.assert_array_equal(found, wanted[real])
    first = metadata.decode_size
    if first < len(line):
        assert (line[first:][real[first:]] >= lines.room - LINES * lines.tiles.row.shape[0]).all()
        back = np.asarray(gpu_lines.collect(placed.q, lines.line, first=first, group=case.group), np.float32)
        np.testing.assert_array_equal(back, np.where(real[first:, None, None, None], wanted[first:], 0))


def test_a_large_row_has_two_tiles():
    row = gpu_lines.RowLines(16, 8)
    assert (row.tiles, row.per_tile, row.used, row.padded) == (2, 4, 64, 64)
    assert gpu_lines.RowLines(3, 1).padded == 8 and jnp.int32(gpu_lines.NOWHERE) < 0
