import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, modelling, tensorcore, tensorcore_clock, tuning
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.generations import BY_NAME, V5E, V5P, V6E
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.quantized_matmul import cases as matmul_cases

OPS = {
    "flash_attention": flash_cases, "grouped_matmul": grouped_cases, "paged_attention": attention_cases, "quantized_matmul": matmul_cases,
}  # fmt: skip
DEMO = matmul_cases.TUNING[0]


@pytest.fixture
def no_compiler(monkeypatch):
    """Whatever is asked for compiles; the list tells what was."""
    asked = []

    def compiled(case, inputs, mesh):
        asked.append((case.name, mesh, tuning.sizes("quantized_matmul", "tpu", dispatch.target(), DEMO.tuning_key())))

    monkeypatch.setattr(modelling, "compiler_version", lambda: "libtpu 0")
    monkeypatch.setattr(modelling, "mesh_of", lambda generation: generation.name)
    monkeypatch.setattr(modelling, "compiled", compiled)
    return asked


def test_ties_keep_the_order_of_the_candidates():
    guesses = [(microseconds, {"keys": number}) for number, microseconds in enumerate((10.1, 10.0, 9.0, 30.0, 12.0))]
    assert [sizes["keys"] for _, sizes in modelling.ranked(guesses)] == [2, 0, 1, 4, 3]


def test_a_row_is_the_best_candidate_that_compiles(no_compiler):
    (row,) = modelling.rows("quantized_matmul", [DEMO], [V5E])
    assert (row.source, row.compiler, row.device, row.implementation) == (tuning.MODELLED, "libtpu 0", "TPU v5 lite", "tpu")
    assert no_compiler == [("demo_one", "v5e", row.sizes)]
    inputs = modelling.described(DEMO, V5E)
    (kernel,) = modelling.kernels(DEMO, inputs, row.sizes, V5E)
    assert row.microseconds == round(1e6 * tensorcore_clock.seconds(kernel, V5E), 1)
    least = DEMO.cost({name: np.zeros(x.shape, x.dtype) for name, x in inputs.items() if x is not None}).bytes / V5E.bandwidth
    assert 1e6 * least < row.microseconds < 20


def test_what_the_compiler_refuses_is_passed_over(monkeypatch, no_compiler):
    def compiled(case, inputs, mesh):
        if tuning.sizes("quantized_matmul", "tpu", dispatch.target(), DEMO.tuning_key())["outputs"] > 512:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem\nand more")

    monkeypatch.setattr(modelling, "compiled", compiled)
    given = [(1.0, {"outputs": 1024}), (2.0, {"outputs": 512}), (3.0, {"outputs": 256})]
    assert modelling.accepted(given, [(DEMO, {})], V6E) == (2.0, {"outputs": 512})
    with pytest.raises(ValueError, match=r"for v6e takes no candidate: \{'outputs': 1024\}: RESOURCE_EXHAUSTED: .* space vmem$"):
        modelling.accepted(given[:1], [(DEMO, {})], V6E)


def test_without_the_compiler_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(modelling, "COMPILER", "no-such-compiler")
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]=="):
        next(modelling.rows("quantized_matmul", [DEMO], [V5E]))


@pytest.mark.parametrize("case", [matmul_cases.CASES[4], matmul_cases.CASES[5], grouped_cases.CASES[4], grouped_cases.CASES[0]])
def test_what_is_described_is_what_is_made(case):
    def look(inputs):
        return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), inputs)

    assert look(case.described()) == look(case.make(0))


@pytest.mark.ci
def test_a_pool_and_its_metadata_are_described_and_both_kernels_of_a_prompt_are_seen():
    case = attention_cases.Case("x", decode_rows=1, prefill_rows=1, prefill_tokens=20, page_size=16, pages_per_row=2)
    inputs = modelling.described(case, V5P)
    assert isinstance(inputs["kv"], jax.ShapeDtypeStruct) and isinstance(inputs["metadata"].page_tables, jax.Array)
    sizes = importlib.import_module("pallas_kernels.paged_attention.tpu").heuristic("tpu", case.tuning_key())
    found = modelling.kernels(case, inputs, sizes, V5P)
    assert [each.cores for each in found] == [2, 1, 2]
    assert all(tensorcore_clock.seconds(each, V5P) > 0 for each in found)


@pytest.mark.parametrize("generation", BY_NAME.values(), ids=lambda each: each.name)
@pytest.mark.parametrize("op", OPS)
def test_rows_that_ship_are_candidates_and_are_found(op, generation, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "user_folder", lambda: tmp_path)
    tuning.table.cache_clear()
    rows = tuning.read(tuning.table_file(tuning.SHIPPED, generation.kind, op))
    module, target = importlib.import_module(f"pallas_kernels.{op}.tpu"), dispatch.Target("tpu", f"TPU {generation.name}")
    keys = [key for key, _ in tuning.by_key(OPS[op].TUNING)]
    assert rows
    for row in rows:
        assert row.key in keys
        assert row.sizes in module.candidates("tpu", row.key)
        assert tuning.sizes(op, "tpu", target, row.key) in [each.sizes for each in rows if each.key == row.key]
    tuning.table.cache_clear()


def test_sizes_that_ship_are_right_in_the_simulator(simulated, against_float64):
    sizes = tuning.sizes("quantized_matmul", "tpu", dispatch.Target("tpu", "TPU v6e"), DEMO.tuning_key())
    with tuning.forced(sizes):
        against_float64("quantized_matmul", "tpu", DEMO, range(1))


def test_limits_of_vmem_hold_two_of_every_buffer():
    inputs, target = modelling.described(DEMO, V5P), dispatch.Target("tpu", V5P.kind)
    outputs = tuning.sizes("quantized_matmul", "tpu", target, DEMO.tuning_key())["outputs"]
    with dispatch.assumed(target), tensorcore.recorded() as found:
        jax.eval_shape(lambda given: DEMO.run(given, "tpu"), inputs)
    (record,) = found
    assert 2 * outputs * 384 < tensorcore.buffer_bytes(record.call) <= record.call.vmem < V5P.vmem
