import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dense_matmul import xla
from pallas_kernels.dense_matmul.cases import Case


@pytest.mark.parametrize("tokens", [1, 9, 20])
def test_a_token_depends_on_itself_alone(tokens):
    inputs = Case("x", tokens=tokens, features=64, outputs=48).make(0)
    run = jax.jit(lambda inputs: xla.dense_matmul(**inputs, out_dtype=jnp.bfloat16))
    other = run(inputs | {"x": inputs["x"].at[1:].set(7.0)})
    assert np.array_equal(run(inputs)[0], other[0])


def test_one_token_on_a_gpu_is_a_sum_over_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    run = jax.jit(lambda inputs: xla.dense_matmul(**inputs, out_dtype=jnp.float32))
    for tokens, dots in ((1, False), (2, True)):
        inputs = Case("x", tokens=tokens, features=64, outputs=48, dtype="float32").make(0)
        assert ("dot(" in run.lower(inputs).compile().as_text()) is dots
        np.testing.assert_allclose(run(inputs), inputs["x"] @ inputs["weight"].T, rtol=1e-5, atol=1e-5)
