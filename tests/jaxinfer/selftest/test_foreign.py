"""What stands in for other tools' checkpoints is close to the model, in the layout that the loader reads."""

import numpy as np
import pytest

from jaxinfer.checkpoint import read
from jaxinfer.quant.qarray import QArray, check
from jaxinfer.selftest import foreign
from jaxinfer.sharding import make_mesh
from tests.driving import GOLDEN, golden_graph


@pytest.mark.parametrize("kind", foreign.CONFIGS)
def test_close_to_the_model(kind, tmp_path):
    foreign.write(GOLDEN / "linear", tmp_path / kind, kind)
    graph, mesh = read.as_stored(tmp_path / kind, golden_graph("linear")), make_mesh({})
    name = "layers.1.mlp.down.weight"
    weight, exact = read.load(tmp_path / kind, graph, mesh)[name], read.load(GOLDEN / "linear", golden_graph("linear"), mesh)[name]
    assert isinstance(weight, QArray)
    check(weight)
    values = np.asarray(weight.values)
    if values.dtype == np.uint8:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(64, 96)
    zeros = 0 if weight.zeros is None else np.repeat(np.asarray(weight.zeros), foreign.GROUP, axis=1)
    found = (values.astype(np.float32) - zeros) * np.repeat(np.asarray(weight.scales), foreign.GROUP, axis=1)
    assert np.abs(found - exact).max() < (0.06 if kind == "fp8" else 0.12) * np.abs(exact).max()
