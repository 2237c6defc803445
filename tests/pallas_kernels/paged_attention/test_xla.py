import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import PagedMetadata, dispatch, paged_attention, tuning
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.paged_attention.packing import row_of_token

QUICK = {"xla_backend_optimization_level": 0}  # quick to compile
SMALL = xla.Sizes(
    decode_keys=16, decode_chunks_at_once=1, decode_keys_at_once=32, prefill_queries=8, prefill_keys=16, prefill_blocks_at_once=2
)


def compiled(case, sizes=SMALL, options=None):
    """A case's op with small blocks, so that every loop goes round several times."""
    with tuning.forced(sizes._asdict()):
        return jax.jit(lambda inputs: case.run(inputs, "xla")).lower(case.make(0)).compile(options)


def without(inputs, rows):
    """The same step in which other rows are empty and their pages are garbage."""
    metadata = inputs["metadata"]
    starts, queries, lengths = (np.array(x) for x in (metadata.query_starts, metadata.query_lengths, metadata.kv_lengths))
    positions, kv, tables = np.array(inputs["positions"]), jax.tree.map(np.array, inputs["kv"]), np.array(metadata.page_tables)
    for row in rows:
        positions[starts[row] : starts[row] + queries[row]] = -1
        for part in jax.tree.leaves(kv):
            part[tables[row][tables[row] > 0]] = 77 if part.dtype == np.int8 else np.nan
        queries[row] = lengths[row] = tables[row] = 0
    arrays = (jnp.asarray(x) for x in (tables, starts, queries, lengths))
    metadata = PagedMetadata(*arrays, metadata.decode_rows, metadata.decode_tokens)
    return inputs | {"metadata": metadata, "positions": jnp.asarray(positions), "kv": jax.tree.map(jnp.asarray, kv)}


def moved(inputs, rng):
    """The same step with every page somewhere else in the pool."""
    metadata, pages = inputs["metadata"], len(jax.tree.leaves(inputs["kv"])[0])
    order = np.concatenate([[0], 1 + rng.permutation(pages - 1)])
    elsewhere = jax.tree.map(lambda part: part[np.argsort(order)], inputs["kv"])
    tables = jnp.asarray(order[np.array(metadata.page_tables)], jnp.int32)
    leaves = (tables, metadata.query_starts, metadata.query_lengths, metadata.kv_lengths)
    return inputs | {"metadata": PagedMetadata(*leaves, metadata.decode_rows, metadata.decode_tokens), "kv": elsewhere}


@pytest.mark.parametrize(("kv_dtype", "tokens"), [(None, 1), ("int8", 3)])
def test_a_row_depends_on_itself_alone(kv_dtype, tokens):
    """Bit for bit: whatever the neighbours' lengths, and wherever the pages lie."""
    case = Case("x", decode_rows=3, prefill_rows=3, prefill_tokens=40, page_size=4, pages_per_row=20, head_dim=16, window=30)
    case = dataclasses.replace(case, kv_dtype=kv_dtype, decode_tokens=tokens)
    run, rng = compiled(case), np.random.default_rng(0)
    for seed in range(6):
        inputs = case.make(seed)
        together = np.asarray(run(inputs).out)
        assert np.array_equal(together, run(moved(inputs, rng)).out), f"seed {seed}"
        metadata = inputs["metadata"]
        for row in np.flatnonzero(np.asarray(metadata.query_lengths)):
            alone = np.asarray(run(without(inputs, set(range(6)) - {row})).out)
            mine = slice(int(metadata.query_starts[row]), int(metadata.query_starts[row] + metadata.query_lengths[row]))
            assert np.array_equal(together[mine], alone[mine]), f"seed {seed} row {row}"


def test_a_broken_row_breaks_no_other():
    """One row's q holds infinities, or its new v NaN: nobody else's result changes by a bit."""
    case = Case("x", decode_rows=4, prefill_rows=2, prefill_tokens=20, page_size=4, pages_per_row=20, head_dim=16)
    run = compiled(case, SMALL, QUICK)
    for seed in range(8):
        inputs = case.make(seed)
        positions = np.asarray(inputs["positions"])
        token = int(np.flatnonzero(positions >= 0)[seed % (positions >= 0).sum()])
        others = np.asarray(row_of_token(inputs["metadata"], len(positions))) != row_of_token(inputs["metadata"], len(positions))[token]
        healthy = np.asarray(run(inputs).out)
        for name, poison in (("q", np.inf), ("v", np.nan)):
            broken = np.asarray(run(inputs | {name: inputs[name].at[token].set(poison)}).out)
            assert np.isnan(broken[token]).any()
            assert np.array_equal(healthy[others], broken[others]), f"seed {seed} {name}"


def test_block_sizes_change_rounding_only():
    case = Case(
        "x", decode_rows=2, prefill_rows=2, prefill_tokens=30, page_size=4, pages_per_row=12, head_dim=16, extras=frozenset({"sinks"})
    )
    whole = xla.Sizes(64, 1, 64, 64, 64, 1)
    runs = [compiled(case, sizes, QUICK) for sizes in (SMALL._replace(decode_chunks_at_once=3, prefill_blocks_at_once=1), whole)]
    for seed in range(5):
        inputs = case.make(seed)
        first, *others = (np.asarray(run(inputs).out) for run in runs)
        for other in others:
            np.testing.assert_allclose(first, other, atol=2e-6)


def test_no_loop_when_a_table_fits_one_chunk():
    short, long = (
        jax.jit(lambda inputs, case=case: case.run(inputs, "xla")).lower(case.make(0)).as_text()
        for case in (Case("x", decode_rows=2, page_size=8, pages_per_row=pages, head_dim=16) for pages in (4, 40))
    )
    assert "stablehlo.while" not in short
    assert "stablehlo.while" in long


def test_the_pool_is_updated_in_place():
    """Several unrolled layers with donated pools: every pool aliased, none copied, scratch smaller than one pool."""
    case = Case("x", decode_rows=3, prefill_rows=2, prefill_tokens=20, page_size=16, pages_per_row=64, head_dim=16)
    inputs = case.make(0)
    pool = inputs.pop("kv")
    layers = 2

    def step(pools, inputs):
        updated = []
        for kv in pools:
            result = case.run(inputs | {"kv": kv}, "xla")
            inputs = inputs | {"q": inputs["q"] + result.out}
            updated.append(result.kv)
        return inputs["q"], tuple(updated)

    program = jax.jit(step, donate_argnums=0).lower((pool,) * layers, inputs).compile(QUICK)
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.alias_size_in_bytes == layers * pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes
    shape = ",".join(str(size) for size in pool.shape)
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)


def test_scores_are_never_whole():
    """Scratch memory does not grow with the table."""
    scratch = [
        compiled(
            Case("x", prefill_rows=1, prefill_tokens=64, page_size=16, pages_per_row=pages, head_dim=16), SMALL, QUICK
        ).memory_analysis()
        for pages in (4, 256)
    ]
    pools = [memory.output_size_in_bytes for memory in scratch]  # the pool is not donated here: one copy of it is scratch or output
    assert scratch[1].temp_size_in_bytes - scratch[0].temp_size_in_bytes < 64 * 6 * 256 * 16 * 4 / 4
    assert pools[1] > pools[0]


def test_under_shard_map():
    """Rows, tokens and pages over data, heads over tensor: the same as one device after the other."""
    case = Case("x", decode_rows=2, prefill_rows=1, prefill_tokens=12, page_size=4, pages_per_row=8, head_dim=16, kv_dtype="int8")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    first, second = case.make(1), case.make(2)
    heads, rows = P("data", "tensor"), P("data")
    inputs = {name: x for name, x in jax.tree.map(lambda *x: jnp.concatenate(x), first, second).items() if name != "rope"}
    specs = {name: heads for name in ("q", "k", "v", "kv")} | {
        "positions": rows,
        "metadata": jax.tree.map(lambda _: rows, inputs["metadata"]),
    }

    def local(inputs):
        return tuple(case.run(inputs | {"rope": first["rope"]}, "xla"))

    with tuning.forced(SMALL._asdict()):
        sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(heads, heads)), compiler_options=QUICK)
        out, kv = sharded(inputs)
    run = compiled(case, SMALL, QUICK)
    for index, one in enumerate((first, second)):
        alone = run(one)
        np.testing.assert_allclose(np.split(np.asarray(out), 2)[index], alone.out, atol=2e-6)
        for part, own in zip(kv, alone.kv, strict=True):
            assert np.array_equal(np.split(np.asarray(part), 2)[index][1:], own[1:], equal_nan=part.dtype == jnp.float32)


def test_candidates_run_from_the_heuristic():
    key = Case("x", decode_rows=1).tuning_key()
    for platform in ("cpu", "gpu", "tpu"):
        first, *rest = xla.candidates(platform, key)
        assert first == xla.heuristic(platform, key)
        assert rest
        for sizes in (first, *rest):
            assert all(size > 0 for size in xla.Sizes(**sizes))


def test_padding_is_written_to_the_guard_page_only():
    case = Case("x", decode_rows=2, prefill_rows=1, prefill_tokens=4, page_size=4, pages_per_row=2, head_dim=8, extras=frozenset())
    inputs = without(case.make(0), {0, 1, 2})
    inputs["kv"] = jnp.ones_like(inputs["kv"])
    result = jax.jit(paged_attention, static_argnames=("spec", "rope"))(
        *(inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")), spec=case.spec, rope=None
    )
    assert (np.asarray(result.kv)[1:] == 1).all()
    assert not np.asarray(result.out).any()


def test_the_pool_of_tpus_is_as_good(monkeypatch):
    case = Case("side", 2, 1, 11, pages_per_row=3, kv_heads=2, group=1, head_dim=96, kv_dtype="int8", decode_tokens=2)
    by_head = compiled(case, options=QUICK)(case.make(0))
    wanted = case.canonical(by_head.kv, "xla")
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("tpu", "TPU v2"))
    with tuning.forced(SMALL._asdict()):
        found = jax.jit(lambda inputs: case.run(inputs, "xla"), compiler_options=QUICK)(case.make(0, "xla"))
    assert np.allclose(found.out, by_head.out, rtol=1e-5, atol=1e-5)
    assert np.allclose(case.canonical(found.kv, "xla")[1:], wanted[1:], rtol=1e-5, atol=1e-5, equal_nan=True)
