"""The reference against a second definition, in plain NumPy and float64, that shares nothing with it."""

import jax
import numpy as np

from pallas_kernels.paged_attention.cases import Case


def by_hand(case, inputs):
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items() if name not in ("metadata", "positions")}
    positions, metadata = np.asarray(inputs["positions"]), jax.tree.map(np.asarray, inputs["metadata"])
    half, page, spec = case.head_dim // 2, case.page_size, case.spec

    def turn(vector, position):
        turned = (vector[..., :half] + 1j * vector[..., half:]) * np.exp(1j * position * x["rope"]) * spec.rope_scale
        return np.concatenate([turned.real, turned.imag], -1)

    out, pool = np.zeros_like(x["q"]), x["kv"].copy()
    for row, table in enumerate(metadata.page_tables):
        tokens = metadata.query_starts[row] + np.arange(metadata.query_lengths[row])
        for token in tokens:
            where = table[positions[token] // page], slice(None), slice(None), positions[token] % page
            pool[where] = np.stack([turn(x["k"][token], positions[token]), x["v"][token]], 1)
        for token in tokens:
            seen = np.arange(max(0, positions[token] + 1 - (spec.window or 10**9)), positions[token] + 1)
            keys, values = pool[table[seen // page], :, :, seen % page].transpose(2, 0, 1, 3)
            for head in range(x["q"].shape[1]):
                scores = keys[:, head // case.group] @ turn(x["q"][token, head], positions[token]) * spec.scale
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                weights = np.exp(scores)
                out[token, head] = weights @ values[:, head // case.group] / (weights.sum() + np.exp(x["sinks"][head]))
    return out, pool


def test_reference_means_what_it_says():
    extras = frozenset({"rope", "sinks"})
    case = Case("x", 2, 2, 12, page_size=4, pages_per_row=5, group=2, head_dim=8, window=7, soft_cap=3.0, extras=extras)
    run = jax.jit(lambda inputs: case.run(inputs, "reference"))
    for seed in range(10):
        inputs = case.make(seed)
        result, (out, pool) = run(inputs), by_hand(case, inputs)
        np.testing.assert_allclose(result.out, out, atol=2e-6)
        np.testing.assert_allclose(result.kv[1:], pool[1:], atol=2e-6)
