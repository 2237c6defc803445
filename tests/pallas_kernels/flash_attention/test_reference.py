"""The reference against a second definition, in plain NumPy and float64, that shares nothing with it."""

import jax
import numpy as np

from pallas_kernels.flash_attention.cases import EVERYTHING, PACKED, Case


def by_hand(case, inputs):
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items() if name != "segment_ids"}
    own, theirs = (np.asarray(ids) for ids in inputs["segment_ids"])
    out = np.zeros_like(x["q"])
    for entry, query, head in np.ndindex(case.batch, case.queries, case.kv_heads * case.group):
        position = int(x["query_offsets"][entry]) + query
        seen = np.arange(max(0, position - case.window + 1), max(min(position + 1, int(x["kv_lengths"][entry])), 0))
        seen = seen[theirs[entry, seen] == own[entry, query]]
        scores = x["k"][entry, seen, head // case.group] @ x["q"][entry, query, head] * case.spec.scale
        weights = np.exp(case.soft_cap * np.tanh(scores / case.soft_cap))
        out[entry, query, head] = weights @ x["v"][entry, seen, head // case.group] / (weights.sum() + np.exp(x["sinks"][head]))
    return out


def test_reference_means_what_it_says():
    case = Case("x", queries=5, keys=20, group=2, head_dim=8, window=6, soft_cap=2.0, extras=EVERYTHING | PACKED)
    run = jax.jit(lambda inputs: case.run(inputs, "reference"))
    for seed in range(10):
        inputs = case.make(seed)
        np.testing.assert_allclose(run(inputs), by_hand(case, inputs), atol=2e-6)
