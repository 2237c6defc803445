import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.token_chain import api
from pallas_kernels.token_chain.reference import Form, Weight

B = jnp.bfloat16
FIRST, SECOND = Weight(jnp.ones((6, 4), jnp.int8), jnp.ones((6, 1))), Weight(jnp.ones((8, 6), jnp.int8), jnp.ones((8, 1)))
GOOD = {
    "x": jnp.ones((1, 4), B), "held": jnp.ones((1, 6), B), "weights": [FIRST, SECOND], "norms": [None, jnp.ones(6, B)],
    "forms": (Form(), Form(True, 0.0)),
}  # fmt: skip


def test_the_package_exports_it():
    assert pallas_kernels.token_chain is api.token_chain
    assert (pallas_kernels.Form, pallas_kernels.Weight, pallas_kernels.Chained) == (Form, Weight, api.Chained)
    assert pallas_kernels.joins is api.joins


def test_good_arguments_pass():
    found = api.token_chain(**GOOD)
    assert found.out.shape == (1, 4) and found.total.shape == (1, 6) and found.out.dtype == found.total.dtype == B
    assert float(found.total[0, 0]) == 5 and float(found.out[0, 0]) == 36  # 6 / (1 + e^-6) * 6, rounded


def test_key():
    key = api.key_of(GOOD["x"], GOOD["weights"])
    known = {"tokens": 1, "dtype": "bfloat16", "weight": "int8", "activations": "float", "links": 2}
    assert key == known | {"out0": 6, "in0": 4, "out1": 8, "in1": 6}
    plain = Weight(SECOND.values.astype(B))
    assert api.key_of(GOOD["x"], [FIRST, plain])["weight"] == "mixed"
    assert api.key_of(GOOD["x"], [plain])["weight"] == "bfloat16"


@pytest.mark.parametrize(("tokens", "activations"), [(1, "float"), (api.FEW + 1, "int8")])
def test_joining_links_is_a_matter_of_what_is_chosen(monkeypatch, tokens, activations):
    given = jnp.ones((tokens, 4), B), GOOD["weights"], activations
    assert not any(api.joins(*given, implementation) for implementation in ("auto", "gpu", "xla", "reference"))  # here is a CPU
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    for chosen in ("xla", "gpu"):
        monkeypatch.setattr(dispatch, "choose", lambda *given, chosen=chosen: chosen)
        assert api.joins(*given, "auto") is (chosen == "gpu")
    for reason in ("by_name", "refusal"):
        monkeypatch.setattr(dispatch, reason, lambda *given: None)
    assert api.joins(*given, "gpu") and not api.joins(*given, "xla")
    assert not api.joins(jnp.ones((api.FEW, 4), B), GOOD["weights"], "int8", "gpu")  # their matmuls wait for weights
    plain = [Weight(weight.values.astype(B)) for weight in GOOD["weights"]]
    mixed = [plain[0], GOOD["weights"][1]]
    for count in (1, 2, 16, 17, 64, 65):
        found = [api.joins(jnp.ones((count, 4), B), weights, "float", "gpu") for weights in (plain, GOOD["weights"], mixed)]
        assert found == [count <= api.MOST["bfloat16"], count <= api.MOST["int8"], count == 1]


def test_many_tokens_are_rounded_each_by_itself():
    many = GOOD | {"x": jnp.stack([jnp.ones(4, B), 100 * jnp.ones(4, B)]), "held": jnp.ones((2, 6), B), "activations": "int8"}
    smooth = {"weights": [FIRST._replace(smooth=2 * jnp.ones(4)), SECOND]}
    assert np.array_equal(api.token_chain(**many).total, [[5.0] * 6, [400.0] * 6])  # 401, rounded
    assert np.array_equal(api.token_chain(**many | smooth).total, [[9.0] * 6, [800.0] * 6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((4,), B)}, r"x is bfloat16\[4\]; it must have shape \[tokens, in\]"),
        ({"x": jnp.zeros((2, 4), B)}, r"held is .*\[tokens, features\], as many tokens as x has"),
        ({"activations": "bfloat16"}, "activations is 'bfloat16'; it must be 'float' or 'int8'"),
        ({"activations": "int8", "x": jnp.zeros((2, 4), B)}, r"held is .*\[tokens, features\], as many tokens as x has"),
        ({"activations": "int8", "weights": [Weight(FIRST.values), SECOND]}, r"weights\[0\] has no scales; weights that meet int8 inputs"),
        (
            {"activations": "int8", "weights": [FIRST._replace(smooth=jnp.ones(3)), SECOND]},
            r"weights\[0\].smooth is float32\[3\]; it must have shape \[4\]",
        ),
        ({"weights": [FIRST._replace(smooth=jnp.ones(4)), SECOND]}, r"weights\[0\] has a smooth; it makes inputs easier to round"),
        ({"x": jnp.zeros((1, 4), jnp.int8)}, "x is int8.*floating"),
        ({"held": jnp.zeros((6,), B)}, r"held is bfloat16\[6\]; it must have shape \[tokens, features\]"),
        ({"held": jnp.zeros((1, 6))}, "held is float32.*it must be bfloat16"),
        ({"norms": [None]}, "one of each is wanted for a link"),
        ({"weights": [], "norms": [], "forms": ()}, "one of each is wanted for a link"),
        ({"held": jnp.zeros((1, 5), B)}, "link 1 adds 6 numbers; the residual stream has 5"),
        ({"norms": [None, jnp.ones(5, B)]}, r"norms\[1\] is bfloat16\[5\]; it must have shape \[6\]"),
        ({"norms": [None, jnp.ones(6)]}, r"norms\[1\] is float32.*it must be bfloat16"),
        ({"weights": [Weight(jnp.ones(6, jnp.int8), jnp.ones((6, 1))), SECOND]}, r"weights\[0\] is int8\[6\].*\[out, in\]"),
        ({"weights": [FIRST] * 2}, r"weights\[1\] is int8\[6, 4\]; it must have shape \[6, 6\]"),
        ({"weights": [Weight(FIRST.values), SECOND]}, r"weights\[0\] is int8.*it must be bfloat16 \(that of x, where"),
        ({"weights": [FIRST._replace(values=FIRST.values.astype(B)), SECOND]}, r"weights\[0\] is bfloat16.*it must be int8"),
        ({"weights": [FIRST._replace(scales=jnp.ones((6, 2))), SECOND]}, r"weights\[0\].scales is float32\[6, 2\]; it must"),
        ({"weights": [FIRST, Weight(jnp.ones((7, 6), jnp.int8), jnp.ones((7, 1)))]}, "two equal halves"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^token_chain: .*{message}"):
        api.check(**(GOOD | changes))
