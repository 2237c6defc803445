"""How the weight is dealt out, and the kernel in jax's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

gpu = pytest.importorskip("pallas_kernels.dense_matmul.gpu")
H200 = dispatch.Target("gpu", "NVIDIA H200")


@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336), (6144, 4096), (64, 64), (128256, 4096)])
@pytest.mark.parametrize("tokens", [8, 16, 64, 128])
def test_every_block_has_one_owner_and_parts_are_counted(monkeypatch, shape, tokens):
    monkeypatch.setattr(gpu.hopper, "cores", lambda: 132)
    plan = gpu.plan_of(tokens, *shape)
    begins = np.arange(plan.workers + 1) * plan.total // plan.workers
    owners = np.repeat(np.arange(plan.workers), np.diff(begins))
    assert np.array_equal(owners, plan.owner(np.arange(plan.total)))
    assert np.array_equal(plan.parts(), [len(set(tile)) for tile in owners.reshape(plan.tiles, plan.length)])
    assert np.diff(begins).max() - np.diff(begins).min() <= 1 and plan.stages >= 3
    assert plan.stages * plan.block * (tokens + plan.consumers * 64) * 2 <= gpu.hopper.SHARED_BYTES


@pytest.mark.parametrize(
    ("target", "key", "reason"),
    [
        (dispatch.Target("gpu", "NVIDIA A100"), {}, "Hopper"),
        (H200, {"dtype": "float32"}, "float32"),
        (H200, {"in": 96, "out": 64}, "multiples of 64, not 96 and 64"),
    ],
)
def test_what_it_refuses(monkeypatch, target, key, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert reason in gpu.refusal(target, key)


def test_a_token_depends_on_itself_alone(interpreted):
    from pallas_kernels.dense_matmul.cases import Case

    inputs = Case("x", tokens=3, features=256, outputs=192).make(0)
    first, other = (gpu.dense_matmul(x, inputs["weight"], out_dtype=jnp.float32) for x in (inputs["x"], inputs["x"].at[1:].set(jnp.nan)))
    assert np.array_equal(first[0], other[0]) and np.isnan(other[1:]).all()
