"""The network attends backwards only, and its weights carry Hugging Face's names."""

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import network
from checkpoints.export import Shape, tensor_shapes

SHAPE = Shape(50, 16, 24, 1, 2, 1, 8, 64)


def test_weights_are_named_and_drawn_repeatably():
    (_, params), (_, again), (_, other) = (network.make(SHAPE, seed, "xla") for seed in (1, 1, 2))
    assert {name: array.shape for name, array in params.items()} == tensor_shapes(SHAPE)
    name = "model.embed_tokens.weight"
    assert np.array_equal(params[name], again[name]) and not np.array_equal(params[name], other[name])


def test_attention_is_causal():
    net, params = network.make(SHAPE, 1, "xla")
    tokens = np.arange(12)[None] % 50
    changed = tokens.copy()
    changed[0, 8:] = 3
    run = jax.jit(net.hidden_states)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        before, after = (np.asarray(run(params, x).astype(jnp.float32)) for x in (tokens, changed))
    assert np.array_equal(before[:, :8], after[:, :8]) and not np.array_equal(before[:, 8:], after[:, 8:])
