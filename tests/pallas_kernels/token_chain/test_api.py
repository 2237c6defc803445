import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.token_chain import api, reference
from pallas_kernels.token_chain.reference import Form

B = jnp.bfloat16
GOOD = {
    "x": jnp.ones((1, 4), B), "held": jnp.ones((1, 6), B), "weights": [jnp.ones((6, 4), jnp.int8), jnp.ones((8, 6), jnp.int8)],
    "scales": [jnp.ones((6, 1)), jnp.ones((8, 1))], "norms": [None, jnp.ones(6, B)], "forms": (Form(), Form(True, 0.0)),
}  # fmt: skip


def test_the_package_exports_it():
    assert pallas_kernels.token_chain is api.token_chain
    assert (pallas_kernels.Form, pallas_kernels.Chained, pallas_kernels.one_kernel) == (reference.Form, api.Chained, api.one_kernel)


def test_good_arguments_pass():
    found = api.token_chain(**GOOD)
    assert found.out.shape == (1, 4) and found.total.shape == (1, 6) and found.out.dtype == found.total.dtype == B
    assert float(found.total[0, 0]) == 5 and float(found.out[0, 0]) == 36  # 6 / (1 + e^-6) * 6, rounded


def test_key():
    key = api.key_of(GOOD["x"], GOOD["weights"], GOOD["scales"])
    assert key == {"tokens": 1, "dtype": "bfloat16", "weight": "int8", "links": 2, "out0": 6, "in0": 4, "out1": 8, "in1": 6}
    mixed = [GOOD["weights"][0], GOOD["weights"][1].astype(B)]
    assert api.key_of(GOOD["x"], mixed, [GOOD["scales"][0], None])["weight"] == "mixed"
    assert api.key_of(GOOD["x"], [mixed[1]], [None])["weight"] == "bfloat16"


def test_one_kernel_is_a_matter_of_what_is_chosen(monkeypatch):
    given = GOOD["x"], GOOD["weights"], GOOD["scales"]
    assert not any(api.one_kernel(*given, implementation) for implementation in ("auto", "gpu", "xla", "reference"))  # here is a CPU
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    for chosen in ("xla", "gpu"):
        monkeypatch.setattr(dispatch, "choose", lambda *given, chosen=chosen: chosen)
        assert api.one_kernel(*given, "auto") is (chosen == "gpu")
    monkeypatch.setattr(dispatch, "refusal", lambda *given: None)
    assert api.one_kernel(*given, "gpu") and not api.one_kernel(*given, "xla")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 4), B)}, r"x is bfloat16\[2, 4\]; it must have shape \[1, in\]: a chain takes one token"),
        ({"x": jnp.zeros((1, 4), jnp.int8)}, "x is int8.*floating"),
        ({"held": jnp.zeros((6,), B)}, r"held is bfloat16\[6\]; it must have shape \[1, features\]"),
        ({"held": jnp.zeros((1, 6))}, "held is float32.*it must be bfloat16"),
        ({"norms": [None]}, "one of each is wanted for a link"),
        ({"weights": [], "scales": [], "norms": [], "forms": ()}, "one of each is wanted for a link"),
        ({"held": jnp.zeros((1, 5), B)}, "link 1 adds 6 numbers; the residual stream has 5"),
        ({"norms": [None, jnp.ones(5, B)]}, r"norms\[1\] is bfloat16\[5\]; it must have shape \[6\]"),
        ({"norms": [None, jnp.ones(6)]}, r"norms\[1\] is float32.*it must be bfloat16"),
        ({"weights": [jnp.ones(6, jnp.int8), GOOD["weights"][1]]}, r"weights\[0\] is int8\[6\]; it must have shape \[out, in\]"),
        ({"weights": [GOOD["weights"][0]] * 2}, r"weights\[1\] is int8\[6, 4\]; it must have shape \[6, 6\]"),
        ({"scales": [None, GOOD["scales"][1]]}, r"weights\[0\] is int8.*it must be bfloat16 \(that of x, where there are no scales\)"),
        ({"weights": [GOOD["weights"][0].astype(B), GOOD["weights"][1]]}, r"weights\[0\] is bfloat16.*it must be int8"),
        ({"scales": [jnp.ones((6, 2)), GOOD["scales"][1]]}, r"scales\[0\] is float32\[6, 2\]; it must have shape \[6, 1\]"),
        ({"weights": [GOOD["weights"][0], jnp.ones((7, 6), jnp.int8)], "scales": [jnp.ones((6, 1)), jnp.ones((7, 1))]}, "two equal halves"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^token_chain: .*{message}"):
        api.check(**(GOOD | changes))
