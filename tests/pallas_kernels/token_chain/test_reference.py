import jax.numpy as jnp
import numpy as np

from pallas_kernels.token_chain import reference
from pallas_kernels.token_chain.cases import CASES
from tests.pallas_kernels.conftest import expected


def test_a_layer_means_what_it_says():
    """Written out in numpy, with the weights that the scales stand for."""
    case = next(case for case in CASES if case.name == "layer")
    inputs, (out, total) = case.make(3), expected("token_chain", case, 3)
    x, held, *_ = (np.asarray(inputs[name], np.float64) for name in ("x", "held"))
    weights = [np.asarray(weight.values, np.float64) * np.asarray(weight.scales, np.float64) for weight in inputs["weights"]]

    def normed(stream, weight):
        return stream / np.sqrt(np.mean(stream**2) + 1e-5) * np.asarray(weight, np.float64)

    between = held + x @ weights[0].T
    gate, up = np.split(normed(between, inputs["norms"][1]) @ weights[1].T, 2, axis=1)
    after = between + (gate / (1 + np.exp(-gate)) * up) @ weights[2].T
    np.testing.assert_allclose(total[1:], after[0], rtol=1e-9)
    np.testing.assert_allclose(out, normed(after, inputs["norms"][3]) @ weights[3].T, rtol=1e-9, atol=1e-9)


def test_gating_is_rounded_once():
    value = jnp.asarray([[1.0, -2.0, 3.0, 5.0]], jnp.bfloat16)
    wide = np.asarray([3 / (1 + np.exp(-1.0)), -10 / (1 + np.exp(2.0))], np.float32)
    assert np.array_equal(reference.gated(value), jnp.asarray(wide, jnp.bfloat16)[None])
