"""A chain of some tens of tokens: what is traced, and what the interpreter, which runs links one by one, can show (a card runs all)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, hopper
from pallas_kernels.hopper_counters import HALF, ROOM
from pallas_kernels.token_chain import api
from pallas_kernels.token_chain.cases import CASES, TUNING

gpu = pytest.importorskip("pallas_kernels.token_chain.gpu")
gpu_tens = pytest.importorskip("pallas_kernels.token_chain.gpu_tens")
tens = pytest.importorskip("pallas_kernels.hopper_tens_plan")
NAMED = {case.name: case for case in (*CASES, *TUNING)}
NEW = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")


def chain(name, sizes):
    """The whole chain of a case, and its arguments."""
    case = NAMED[name]
    given = case.described()
    links = gpu.links_of([weight.values for weight in given["weights"]], given["norms"], case.forms)

    def run(x, held, weights, norms, counters):
        return gpu_tens.run(x, held, weights, norms, links, jax.new_ref(counters), sizes)

    counters = jax.ShapeDtypeStruct((ROOM + 2 * HALF,), jnp.int32)
    return run, (given["x"], given["held"], given["weights"], given["norms"], counters)


@NEW
@pytest.mark.parametrize("name", ["8b_bfloat16_64", "1b_bfloat16_40"])
@pytest.mark.parametrize("sizes", tens.CANDIDATES)
def test_links_are_one_kernel_whose_blocks_wait_for_each_other(monkeypatch, name, sizes):
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    run, arguments = chain(name, sizes)
    traced = str(jax.make_jaxpr(run)(*arguments))
    assert traced.count("name=_run") == 1
    assert traced.count("tell.<locals>.count") == 3  # each link's results but the last one's
    assert traced.count("wait.<locals>.look") == 3 + 2  # by who copies inputs, and by who works factors out
    assert traced.count("roots.<locals>.work") == 2 and traced.count("last.<locals>.count") == 1


@NEW
@pytest.mark.parametrize("sizes", tens.CANDIDATES)
def test_it_lowers_for_a_gpu(monkeypatch, sizes):
    """As far as that goes without the plugin; layouts are inferred by then."""
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    run, arguments = chain("1b_bfloat16_40", sizes)
    assert "mosaic_gpu" in jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_a_tokens_results_depend_on_it_alone(interpreted):
    case = NAMED["tens"]
    inputs = case.make(0)
    whole = case.run(inputs, "gpu")
    part = case.run(inputs | {"x": inputs["x"][1:18], "held": inputs["held"][1:18]}, "gpu")
    for mine, other in zip(whole, part, strict=True):
        assert np.array_equal(mine[1:18], other)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_token(interpreted, bad):
    case = NAMED["tens"]
    inputs = case.make(0)
    out, total = case.run(inputs | {"x": inputs["x"].at[1, 5].set(bad)}, "gpu")
    others = np.array([0, *range(2, case.tokens)])
    assert not np.isfinite(np.asarray(out[1], np.float32)).any() and not np.isfinite(np.asarray(total[1], np.float32)).any()
    assert np.isfinite(np.asarray(out[others], np.float32)).all()


@NEW
def test_models_join_their_links_for_it(monkeypatch):
    monkeypatch.setattr(hopper, "known_cores", lambda: 132)
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    joined = {}

    def ask(name, x, weights):
        joined[name] = [api.joins(x, weights, "float", implementation) for implementation in ("auto", "gpu")]

    for name in ("8b_bfloat16_16", "8b_bfloat16_64"):
        given = NAMED[name].described()
        jax.eval_shape(lambda x, weights, name=name: ask(name, x, weights), given["x"], given["weights"])
    assert joined == {"8b_bfloat16_16": [True, True], "8b_bfloat16_64": [True, True]}
