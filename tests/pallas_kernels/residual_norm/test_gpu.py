"""What is refused, which shapes are XLA's, and the kernel in jax's interpreter (the contract test runs it over the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.residual_norm.cases import CASES, Case

gpu = pytest.importorskip("pallas_kernels.residual_norm.gpu")
H200 = dispatch.Target("gpu", "NVIDIA H200")


@pytest.mark.parametrize(
    ("target", "key", "reason"),
    [
        (dispatch.Target("gpu", "NVIDIA A100"), {}, "Hopper"),
        (H200, {"dtype": "float32"}, "float32"),
        (H200, {"features": 192}, "features in multiples of 128, not 192"),
        (H200, {"features": 384, "dtype": "float16"}, None),
    ],
)
def test_what_it_refuses(monkeypatch, target, key, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    found = gpu.refusal(target, key)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("tokens", "features", "vector"), [(1, 4096, 8), (1, 5120, 8), (1, 384, 1), (1, 8192, 8), (1, 16384, 0), (2, 4096, 0)]
)
def test_sizes(tokens, features, vector):
    key = Case("x", tokens, features).tuning_key()
    assert gpu.heuristic("gpu", key) == {"vector": vector}
    assert gpu.heuristic("gpu", key) in gpu.candidates("gpu", key) and len(gpu.candidates("gpu", key)) == 2
    assert all(features % (128 * each["vector"]) == 0 for each in gpu.candidates("gpu", key)[:1])


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_one_token_is_one_kernel_and_others_are_xlas(interpreted, case):
    traced = str(jax.make_jaxpr(lambda inputs: case.run(inputs, "gpu"))(case.make(0)))
    assert traced.count("name=_one_kernel") == (case.tokens == 1)


def test_a_token_depends_on_itself_alone_and_both_results_are_right(interpreted):
    case = Case("x", tokens=3, features=256)
    inputs = case.make(0)
    with tuning.forced({"vector": 2}):
        first, other = (case.run(inputs | {"added": added}, "gpu") for added in (inputs["added"], inputs["added"].at[1:].set(jnp.nan)))
        alone = case.run({name: value if name == "weight" else value[:1] for name, value in inputs.items()}, "gpu")
    wanted = case.run(inputs, "reference")
    assert np.array_equal(first.total, wanted.total)
    np.testing.assert_allclose(*(np.asarray(each.normed, np.float32) for each in (first, wanted)), rtol=2**-6)
    for found in (other, alone):
        assert np.array_equal(first.normed[:1], found.normed[:1]) and np.array_equal(first.total[:1], found.total[:1])
    assert np.isnan(np.asarray(other.normed[1:], np.float32)).all()
