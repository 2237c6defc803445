"""How the weight is dealt out, what is refused, and the kernel in jax's interpreter (the contract test runs it over the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.quantized_matmul.cases import Case

gpu = pytest.importorskip("pallas_kernels.quantized_matmul.gpu")
H200 = dispatch.Target("gpu", "NVIDIA H200")


@pytest.mark.parametrize("shape", [(4096, 28672), (14336, 4096), (4096, 128256), (128, 64), (384, 1152)])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_sizes_fit_the_shape_and_the_memory(monkeypatch, shape, weight, tokens):
    monkeypatch.setattr(gpu.hopper, "cores", lambda: 132)
    case = Case("x", tokens, *shape, dtype="bfloat16", weight=weight, group=128 if weight == "int4" else 0)
    found = gpu.candidates("gpu", case.tuning_key())
    assert gpu.heuristic("gpu", case.tuning_key()) in found
    assert found[-1] == gpu.XLA._asdict()
    for sizes in found[:-1]:
        if sizes == gpu.ONE._asdict() or sizes["splits"]:
            continue  # dealt out by those kernels' own files
        kind = gpu.Format(weight, 1, case.group, "float")
        plan = gpu.plan_of(gpu.Sizes(**sizes), tokens + -tokens % 8, case.outputs, case.features, kind)
        assert plan.deal.tiles * plan.consumers * 64 == case.outputs and plan.deal.length * plan.block == case.features
        assert 2 <= plan.stages <= gpu.hopper.BARRIERS and plan.block % plan.step == 0
        stage = plan.block * (plan.consumers * 64 * gpu.BITS[weight] // 8 + 2 * plan.tokens)
        assert plan.stages * stage + 1024 <= gpu.hopper.SHARED_BYTES


def chosen(tokens, features, outputs, **changes):
    return gpu.candidates("gpu", Case("x", tokens, features, outputs, **{"dtype": "bfloat16"} | changes).tuning_key())


def test_one_token_of_int8_has_a_kernel_of_its_own():
    first, *others = chosen(1, 4096, 6144)
    assert first == gpu.ONE._asdict() == gpu.heuristic("gpu", Case("x", 1, 4096, 6144, dtype="bfloat16").tuning_key())
    assert others == [sizes for sizes in chosen(2, 4096, 6144) if not sizes["splits"]] and len(others) > 2
    assert chosen(1, 1024, 200, rows=8) == chosen(1, 1024, 200, dtype="float16") == [gpu.ONE._asdict(), gpu.XLA._asdict()]
    for changes in ({"weight": "fp8"}, {"weight": "int4", "group": 128}, {"group": 128}, {"activations": "int8"}, {"dtype": "float32"}):
        assert gpu.ONE._asdict() not in chosen(1, 4096, 6144, **changes)


def test_one_token_is_taken_where_the_kernel_of_few_refuses(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    key = Case("x", 1, 1024, 200, dtype="float16").tuning_key()
    assert gpu.refusal(H200, key) is None
    assert "float16" in gpu.refusal(H200, key | {"tokens": 2}) and "Hopper" in gpu.refusal(dispatch.Target("gpu", "NVIDIA A100"), key)


def test_a_few_tokens_of_int8_are_cut_into_limbs():
    first = chosen(64, 4096, 6144)[0]
    assert first["splits"] and first == gpu.heuristic("gpu", Case("x", 64, 4096, 6144, dtype="bfloat16").tuning_key())
    for changes in ({"weight": "fp8"}, {"weight": "int4", "group": 128}, {"group": 128}, {"activations": "int8"}, {"dtype": "float32"}):
        assert not any(sizes["splits"] for sizes in chosen(64, 4096, 6144, **changes))
    assert not any(sizes["splits"] for sizes in chosen(65, 4096, 6144))


@pytest.mark.parametrize("sizes", [gpu.Sizes(2, 128, 1), gpu.Sizes(1, 128), gpu.XLA])
def test_all_candidates_agree_on_a_few_tokens(interpreted, sizes, against_float64):
    with tuning.forced(sizes._asdict()):
        against_float64("quantized_matmul", "gpu", Case("x", 5, 384, 128, dtype="bfloat16", rows=32), range(2))


@pytest.mark.parametrize("sizes", [gpu.ONE, gpu.Sizes(1, 128), gpu.XLA])
def test_all_candidates_agree_on_one_token(interpreted, sizes, against_float64):
    with tuning.forced(sizes._asdict()):
        against_float64("quantized_matmul", "gpu", Case("x", 1, 384, 64, dtype="bfloat16", rows=32), range(2))


@pytest.mark.parametrize(
    ("target", "key", "reason"),
    [
        (dispatch.Target("gpu", "NVIDIA A100"), {}, "Hopper"),
        (H200, {"dtype": "float32"}, "float32"),
        (H200, {"in": 192, "out": 64}, "inputs in multiples of 128 and outputs in multiples of 64, not 192 and 64"),
        (H200, {"group": 32}, "groups in multiples of 64 inputs, not 32"),
    ],
)
def test_what_it_refuses(monkeypatch, target, key, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert reason in gpu.refusal(target, key)


def test_inputs_for_float8_are_near_one_and_exact():
    x = jnp.asarray([[3e4, 1.0, 2.0**-8], [0, 0, 0], [1e-20, 2e-20, 0]], jnp.bfloat16)
    values, factors = gpu._inputs(x, gpu.Format("fp8", 1, 0, "float"))
    assert values.dtype == jnp.float16 and values.shape == (8, 3) and float(jnp.abs(values).max()) < 2
    assert np.array_equal(values[:3].astype(jnp.float32) * factors[:3], x.astype(jnp.float32))


@pytest.mark.parametrize("sizes", [{"consumers": 1, "block": 128}, {"consumers": 2, "block": 256}])
def test_a_token_depends_on_itself_alone(interpreted, sizes):
    case = Case("x", tokens=3, features=512, outputs=128, dtype="bfloat16", weight="int4", group=64)
    inputs = case.make(0)
    with tuning.forced(sizes):
        first, other = (case.run(inputs | {"x": x}, "gpu") for x in (inputs["x"], inputs["x"].at[1:].set(jnp.nan)))
    assert np.array_equal(first[0], other[0]) and np.isnan(other[1:]).all()


@pytest.mark.parametrize("tokens", [0, gpu.MOST + 1])
def test_no_tokens_and_many_are_for_xla(interpreted, tokens):
    case = Case("x", tokens=tokens, features=128, outputs=64, dtype="bfloat16")
    inputs = case.make(0)
    assert np.array_equal(case.run(inputs, "gpu"), case.run(inputs, "xla"))
