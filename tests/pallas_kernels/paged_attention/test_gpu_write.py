import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import rope_table, rotate
from pallas_kernels.paged_attention import gpu_lines, gpu_spread, gpu_write
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.paged_attention.pool import QuantizedKV, dequantize

PAGES, PAGE = 9, 8


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_parts_begin_where_a_copy_may_begin(head_dim, group):
    """At multiples of 128 bytes, none over another."""
    heads = gpu_write.Heads(2, group, head_dim, PAGE)
    taken = set()
    for head in range(2):
        for _, row, count in heads.segments:
            begin = head * heads.pitch + row
            assert begin * heads.half * 2 % gpu_write.ALIGNMENT == 0
            assert not taken & set(range(begin, begin + count))
            taken |= set(range(begin, begin + count))
    assert len(taken) == 2 * (group + 2) and heads.at_once * heads.half % gpu_spread.THREADS == 0


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 4, 128), (1, 3, 64)])
def test_everything_goes_to_its_place(interpreted, kv_heads, group, head_dim):
    """Queries and keys rotated, values as they are; the rest of the pool and what is NOWHERE stay away."""
    tokens, heads, rng = 6, gpu_write.Heads(kv_heads, group, head_dim, PAGE), np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((tokens, kv_heads, group + 2, head_dim)), jnp.bfloat16)
    rope = jnp.asarray((10000.0 ** -np.linspace(0, 1, head_dim // 2)).astype(np.float32))
    table = rope_table(jnp.asarray(rng.integers(0, 500, tokens), jnp.int32), rope, 1.0)
    slots = (rng.permutation((PAGES - 1) * PAGE)[:tokens] + PAGE).astype(np.int32)
    lines = (np.arange(tokens) * group).astype(np.int32)
    slots[1], lines[2] = gpu_write.NOWHERE, gpu_write.NOWHERE
    kv = jnp.full((PAGES, kv_heads, 2, PAGE, head_dim), 7, jnp.bfloat16)
    run = jax.jit(lambda *given: gpu_write.rotate_and_write(*given, room=tokens * group + 8))
    placed = run(qkv, gpu_write.waves(table, heads), jnp.asarray(slots), jnp.asarray(lines), kv)
    turned = rotate(qkv.reshape(tokens, -1, head_dim), table).reshape(qkv.shape)
    plain, turned = np.asarray(qkv, np.float32), np.asarray(turned, np.float32)
    wanted = np.full(kv.shape, 7, np.float32)
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[slot // PAGE, :, 0, slot % PAGE] = turned[token, :, group]
            wanted[slot // PAGE, :, 1, slot % PAGE] = plain[token, :, group + 1]
    np.testing.assert_allclose(np.asarray(placed.kv, np.float32), wanted, rtol=2**-7)
    found = np.asarray(placed.q, np.float32)
    for token, line in enumerate(lines):
        if line >= 0:
            np.testing.assert_allclose(found[:, line : line + group], turned[token, :, :group], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("few", "rotary", "kv_dtype"),
    [
        (16, 8, None),
        *(
            pytest.param(*given, marks=(pytest.mark.ci, pytest.mark.interpreter))
            for given in ((0, 8, None), (16, 32, "int8"), (0, 32, "int8"), (16, 0, None), (16, 8, "int8"), (0, 0, None))
        ),
    ],
)
def test_both_ways_place_as_xla_does(interpreted, monkeypatch, few, rotary, kv_dtype):
    """Few tokens and many, with all features rotated, some, and none."""
    way, spread = gpu_spread.rotate_and_write, []
    monkeypatch.setattr(gpu_write, "FEW", few)
    monkeypatch.setattr(gpu_spread, "rotate_and_write", lambda *given, **more: spread.append(1) or way(*given, **more))
    case = Case("x", 3, 2, 9, page_size=32, pages_per_row=2, kv_heads=2, group=4, dtype="bfloat16", kv_dtype=kv_dtype)
    inputs = case.make(2, "xla")
    positions, metadata = inputs["positions"], inputs["metadata"]
    lines = gpu_lines.layout(positions, metadata, case.group)
    given = [inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")]
    more = {"lines": lines, "spec": case.spec, "rope": inputs["rope"][:rotary] if rotary else None}
    found, wanted = (jax.jit(lambda *given, way=way: way.place(*given, **more))(*given) for way in (gpu_write, gpu_lines))
    assert len(spread) == (few > 0)
    covered = np.asarray(lines.line)[np.asarray(positions) >= 0][:, None] + np.arange(case.group)
    queries = [np.asarray(each.q, np.float32)[:, covered] for each in (found, wanted)]
    np.testing.assert_allclose(*queries, rtol=2**-7, atol=1e-6)
    pools = [dequantize(each.kv, jnp.float32) if isinstance(each.kv, QuantizedKV) else each.kv for each in (found, wanted)]
    np.testing.assert_allclose(*(np.asarray(pool[1:], np.float32) for pool in pools), rtol=2**-7, atol=0.05 if kv_dtype else 1e-6)


def test_outputs_find_back(interpreted):
    rng = np.random.default_rng(0)
    lines = jnp.asarray(rng.standard_normal((2, 12, 64)), jnp.bfloat16)
    line = jnp.asarray([0, 9, gpu_write.NOWHERE, 3], jnp.int32)
    out = np.asarray(jax.jit(lambda lines, line: gpu_write.collect(lines, line, first=1, group=3))(lines, line))
    assert out.shape == (3, 2, 3, 64) and not out[1].any()
    np.testing.assert_array_equal(out[0], np.asarray(lines)[:, 9:12])
    np.testing.assert_array_equal(out[2], np.asarray(lines)[:, 3:6])
