"""A mixture of experts against a slow twin, and shares of weights."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models import experts, llama, mixtral
from jaxinfer.models.experts import Routed, share_met, share_used
from jaxinfer.models.graph import Graph, arrays_of


def test_each_token_goes_through_its_own_experts():
    draw = np.random.default_rng(0)
    x, gate_up, down = (draw.normal(size=shape).astype(np.float32) for shape in ((5, 8), (3, 2, 6, 8), (3, 8, 6)))
    chosen, shares = np.array([[0, 2], [2, 0], [3, 3], [0, 2], [2, 0]], np.int32), draw.uniform(size=(5, 2)).astype(np.float32)
    found = jax.jit(experts.through)(x, Routed(jnp.asarray(chosen), jnp.asarray(shares)), gate_up, down)
    wanted = np.zeros((5, 8))
    for token in range(5):
        for expert, share in zip(chosen[token], shares[token], strict=True):
            if expert < 3:  # the third token is padding, and sent to none
                gate, up = gate_up[expert].astype(np.float64) @ x[token]
                wanted[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5) and not np.asarray(found)[2].any()


def test_shares_of_weights():
    graph = Graph.of(mixtral, mixtral.TINY, "float32")  # two of four experts
    arrays = {name: arrays_of(spec)[0] for name, spec in zip(graph.names, graph.specs, strict=True)}
    expert, router = arrays["layers.0.experts.down.weight"], arrays["layers.0.experts.router.weight"]
    assert share_used(expert, graph.config) == 0.5 and share_used(router, graph.config) == 1
    assert [share_met(expert, graph.config, tokens) for tokens in (0, 1, 2, float("inf"))] == [0, 0.5, 0.75, 1]
    assert share_met(router, llama.TINY, 1) == 1
