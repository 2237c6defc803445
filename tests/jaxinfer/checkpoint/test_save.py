"""What is saved is read back bit for bit, from the names that the checkpoint has."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.checkpoint import manifest, read, save
from jaxinfer.models import llama
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.sharding import make_mesh
from tests.driving import GOLDEN, golden_graph
from tests.weight_files import read_all


def test_a_golden_model_is_written_as_it_was(tmp_path):
    graph, mesh = golden_graph("biased"), make_mesh({})
    hashes = save.save(tmp_path, graph, read.load(GOLDEN / "biased", graph, mesh), np.dtype(np.float32))
    before, after = read_all(GOLDEN / "biased" / "model.safetensors"), read_all(tmp_path / "model.safetensors")
    assert set(hashes["model.safetensors"]) == set(before) == set(after)
    assert all(np.array_equal(values.astype(np.float32), after[name]) for name, values in before.items())


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}])
def test_shards_come_together_and_the_folder_is_read_again(tmp_path, axes):
    graph, mesh = Graph.of(llama, replace(llama.TINY, tied_embeddings=True), "float32"), make_mesh(axes)
    weights, told = random_weights(graph, 3, mesh), []
    hashes = save.save(tmp_path, graph, weights, np.dtype(np.float32), progress=lambda *report: told.append(report))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    manifest.write(tmp_path, hashes)
    found = read.load(tmp_path, graph, mesh)
    assert all(np.array_equal(weights[name], found[name]) for name in graph.names) and told[-1] == (graph.nbytes, graph.nbytes)
