"""What is refused, and links in jax's interpreter (the contract test runs it over the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, hopper
from pallas_kernels.token_chain.cases import CASES, TUNING
from pallas_kernels.token_chain.reference import Weight

gpu = pytest.importorskip("pallas_kernels.token_chain.gpu")
H200 = dispatch.Target("gpu", "NVIDIA H200")
KEY = CASES[0].tuning_key()


@pytest.fixture(autouse=True)
def cores_are_known(monkeypatch):
    """As on a card."""
    monkeypatch.setattr(hopper, "known_cores", lambda: 132)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (dispatch.Target("gpu", "NVIDIA A100"), {}, "Hopper"),
        (H200, {"dtype": "float32", "weight": "float32"}, "float32"),
        (H200, {"weight": "mixed"}, "all int8 with scales, or all of the token's dtype"),
        (H200, {"dtype": "float16", "weight": "bfloat16"}, "all int8 with scales, or all of the token's dtype"),
        (H200, {"in2": 192}, "inputs in multiples of 128 up to 32768"),
        (H200, {"in2": 32896}, "inputs in multiples of 128 up to 32768"),
        (H200, {"out1": 144}, "outputs in multiples of 64, or of 32 or 16 where"),
        (H200, {"in1": 32768, "in2": 32768}, "pass 65792 numbers on, and there is room for 65536"),
        (H200, {}, None),
        (H200, {"tokens": 0}, "up to 16 tokens, not 0"),
        (H200, {"tokens": 4}, "inputs in multiples of 256"),
        (H200, {"tokens": 4} | {f"{name}{number}": 512 for name in ("in", "out") for number in range(4)}, None),
        (H200, {"tokens": 4, "dtype": "float16"}, "weights that are all so, or all int8, not float16 and int8"),
        (H200, {"weight": "bfloat16"}, None),
        (H200, {"activations": "int8", "tokens": 70, "in1": 32768}, "its kernel between int8 matmuls"),
        (H200, {"activations": "int8", "tokens": 70, "out1": 100}, None),
    ],
)
def test_what_it_refuses(monkeypatch, target, changes, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    found = gpu.refusal(target, KEY | changes)
    assert found is None if reason is None else reason in found
    assert gpu.refusal(target, {}) is None or target != H200


def test_a_device_whose_multiprocessors_are_unknown_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(hopper, "known_cores", lambda: None)
    assert "does not say how many" in str(gpu.refusal(H200, KEY))


@pytest.mark.parametrize("case", [*CASES, *TUNING], ids=lambda case: case.name)
def test_links_are_what_the_cases_say(case):
    given = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in case.shapes]
    found = gpu.links_of(given, [True if part.normed else None for part in case.parts], case.forms)
    for link, (outputs, inputs), part in zip(found, case.shapes, case.parts, strict=True):
        assert (link.outputs, link.inputs, link.gated, link.normed) == (outputs, inputs, part.gated, part.normed)
        assert link.offset == part.offset


@pytest.mark.parametrize("weight", ["int8", "plain"])
def test_results_depend_on_their_own_rows_alone(interpreted, weight):
    """The same bits where a weight is dealt out in other tiles."""
    case = next(case for case in CASES if case.name == "gated")
    inputs = case.make(0)
    first = case.run(inputs, "gpu")[0]
    gate, up = jnp.split(inputs["weights"][0].values, 2)
    part = case.run(inputs | {"weights": [Weight(jnp.concatenate([gate[16:64], up[16:64]]))]}, "gpu")[0]
    assert np.array_equal(first[:, 16:64], part)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(interpreted, bad):
    case = next(case for case in CASES if case.name == "layer")
    inputs = case.make(0)
    out, total = case.run(inputs | {"x": inputs["x"].at[0, 5].set(bad)}, "gpu")
    assert jnp.isnan(out).all() and not jnp.isfinite(total).any()


def test_sizes():
    assert gpu.heuristic("gpu", KEY) in gpu.candidates("gpu", KEY)


def test_sizes_are_those_that_all_links_fit_beside():
    """18,816 inputs, an odd multiple of 128, leave no room for three slots of 32 KB."""
    some = {sizes["slot"] for sizes in gpu.candidates("gpu", KEY | {"in2": 18816})}
    assert some == {gpu.SLOTS[0]} and {sizes["slot"] for sizes in gpu.candidates("gpu", KEY)} == set(gpu.SLOTS)


def test_it_is_what_a_hopper_gpu_gets(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert dispatch.choose("token_chain", "auto", H200, KEY) == "gpu"
