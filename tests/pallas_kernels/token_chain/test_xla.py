import jax
import numpy as np

from pallas_kernels.token_chain import xla
from pallas_kernels.token_chain.cases import CASES


def test_the_stream_is_what_is_added_before_a_norm_and_nothing_else():
    case = next(case for case in CASES if case.name == "gated")
    inputs = case.make(0)
    out, total = xla.token_chain(**inputs, forms=case.forms)
    assert total is inputs["held"] and out.shape == (1, 112)
    again = jax.jit(lambda inputs: case.run(inputs, "xla"))(inputs)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(again[0], np.float32), rtol=2**-6, atol=1e-3)
