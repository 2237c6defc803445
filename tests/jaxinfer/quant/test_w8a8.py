"""int8 activations: the weights of int8, and factors that move outliers into them."""

import numpy as np
import pytest

from jaxinfer.quant import int8, w8a8
from jaxinfer.sharding import ArraySpec

WEIGHT = ArraySpec((6, 4, 2), np.dtype(np.float32), ("embed", "mlp", None))


def test_describes_what_int8_does_and_says_that_inputs_are_quantised():
    ours, plain = w8a8.describe(WEIGHT, 2), int8.describe(WEIGHT, 2)
    assert (ours.values, ours.scales, ours.activations, ours.scheme) == (plain.values, plain.scales, "int8", "w8a8")
    smoothed = w8a8.describe_smoothed(WEIGHT, 2)
    assert smoothed.smooth == ArraySpec((4, 2), np.dtype(np.float32), ("mlp", None))


def test_smoothing_shares_the_difficulty():
    inputs, weights = np.asarray([64.0, 1.0, 0.0]), np.asarray([1.0, 4.0, 1.0])
    smooth = w8a8.smoothing(inputs, weights)
    assert np.allclose(inputs[:2] * smooth[:2], weights[:2] / smooth[:2]) and smooth[2] == 1
    assert np.allclose(w8a8.smoothing(inputs, weights, strength=0.0), weights)
    assert np.allclose(w8a8.smoothing(inputs[:2], weights[:2], strength=1.0), 1 / inputs[:2])


def test_smoothing_an_outlier_makes_the_product_better():
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(16, 64)), random.normal(size=(32, 64))
    x[:, 3] *= 100
    smooth = w8a8.smoothing(np.abs(x).max(0), np.abs(weight).max(0)).astype(np.float64)

    def error(factors):
        scaled, moved = x * factors, (weight / factors).astype(np.float32)
        steps = np.abs(scaled).max(1, keepdims=True) / 127
        scales = w8a8.scales(moved, (1, 64))
        found = np.rint(scaled / steps) * steps @ (w8a8.values(moved, scales) * scales).T
        return np.abs(found - x @ weight.T).mean()

    assert error(smooth) < 0.5 * error(np.ones(64))


@pytest.mark.parametrize("change", [{"strength": 1.5}, {"inputs": np.asarray([np.inf])}])
def test_nonsense_is_refused(change):
    inputs = change.pop("inputs", np.ones(1))
    with pytest.raises(ValueError, match=r"outside|finite"):
        w8a8.smoothing(inputs, np.ones(1), **change)
