import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.residual_norm import xla
from pallas_kernels.residual_norm.cases import Case


def test_a_token_depends_on_itself_alone():
    inputs = Case("x", tokens=3, features=64).make(0)
    run = jax.jit(lambda inputs: xla.residual_norm(**inputs, epsilon=1e-5, offset=0.0))
    first, other = run(inputs), run(inputs | {"x": inputs["x"].at[1:].set(jnp.nan)})
    assert all(np.array_equal(one[0], another[0]) for one, another in zip(first, other, strict=True))
    assert np.isnan(np.asarray(other.normed[1:], np.float32)).all()
