"""A chain of a few tokens: what is traced, and what the interpreter, which runs links one by one, can show (a card runs all of it)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper_counters import HALF, ROOM
from pallas_kernels.token_chain.cases import CASES, TUNING
from pallas_kernels.token_chain.reference import Weight

gpu = pytest.importorskip("pallas_kernels.token_chain.gpu")
gpu_few = pytest.importorskip("pallas_kernels.token_chain.gpu_few")
few = pytest.importorskip("pallas_kernels.hopper_few_plan")
NAMED = {case.name: case for case in (*CASES, *TUNING)}
NEW = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")


@NEW
@pytest.mark.parametrize("name", ["8b_bfloat16_8", "8b_bfloat16_16", "8b_int8_16"])
@pytest.mark.parametrize("count", [4, 3, 1])
def test_links_are_one_kernel_whose_blocks_wait_for_each_other(monkeypatch, name, count):
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    case = NAMED[name]
    given = case.described()
    weights = given["weights"]
    links = gpu.links_of([weight.values for weight in weights], given["norms"], case.forms)

    def run(x, held, weights, norms, counters):
        return gpu_few.run(x, held, weights[:count], norms[:count], links[:count], jax.new_ref(counters), few.Sizes())

    counters = jax.ShapeDtypeStruct((ROOM + 2 * HALF,), jnp.int32)
    traced = str(jax.make_jaxpr(run)(given["x"], given["held"], weights, given["norms"], counters))
    normed = sum(link.normed for link in links[:count])
    assert traced.count("name=_run") == 1
    assert traced.count("tell.<locals>.count") == count - 1  # each link's results but the last one's
    assert traced.count("wait.<locals>.look") == count - 1 + normed  # by who copies inputs, and by who works factors out
    assert traced.count("roots.<locals>.work") == normed
    assert traced.count("last.<locals>.count") == 1  # and the last block leaves zeros


@NEW
@pytest.mark.parametrize("name", ["8b_bfloat16_8", "8b_int8_16", "few", "few_gated_first", "few_norm_first", "few_last", "few_int8"])
def test_it_lowers_for_a_gpu(monkeypatch, name):
    """As far as that goes without the plugin; layouts are inferred by then."""
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    case = NAMED[name]
    given = case.described()
    norms, links = given["norms"], gpu.links_of([weight.values for weight in given["weights"]], given["norms"], case.forms)

    def run(x, held, weights, norms, counters):
        return gpu_few.run(x, held, weights, norms, links, jax.new_ref(counters), few.Sizes())

    counters = jax.ShapeDtypeStruct((ROOM + 2 * HALF,), jnp.int32)
    arguments = (given["x"], given["held"], given["weights"], norms, counters)
    assert "mosaic_gpu" in jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["few", "few_int8"])
def test_a_tokens_results_depend_on_it_alone(interpreted, name):
    case = NAMED[name]
    inputs = case.make(0)
    whole = case.run(inputs, "gpu")
    part = case.run(inputs | {"x": inputs["x"][2:4], "held": inputs["held"][2:4]}, "gpu")
    for mine, other in zip(whole, part, strict=True):
        assert np.array_equal(mine[2:4], other)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("name", ["few", "few_int8"])
def test_what_is_not_finite_stays_in_its_token(interpreted, name, bad):
    inputs = NAMED[name].make(0)
    out, total = NAMED[name].run(inputs | {"x": inputs["x"].at[1, 5].set(bad)}, "gpu")
    assert not np.isfinite(np.asarray(out[1], np.float32)).any() and not np.isfinite(np.asarray(total[1], np.float32)).any()
    assert np.isfinite(np.asarray(out[np.array([0, 2, 3])], np.float32)).all()


def test_results_depend_on_their_own_rows_alone(interpreted):
    """The same bits where a weight is dealt out in other tiles."""
    inputs, forms = NAMED["few_offset"].make(0), NAMED["few_offset"].forms[1:]
    x, norms = inputs["held"], inputs["norms"][1:]

    def run(rows):
        values = inputs["weights"][1].values[:rows]
        return gpu_few.run(x, x, [Weight(values)], norms, gpu.links_of([values], norms, forms), None, few.Sizes())

    assert np.array_equal(run(192)[0][:, :64], run(64)[0])
