"""A tiny target, a smaller draft that knows nothing yet, a few texts, and one compiled training step that all tests here share."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from jaxinfer.checkpoint import save
from jaxinfer.models import llama
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.models.layers import Placement
from jaxinfer.sharding import make_mesh
from jaxinfer.train import draft
from jaxinfer.train.learner import Learner, Recipe
from jaxinfer.train.rows import Text, pack
from jaxinfer.train.teacher import Teacher
from tests.jaxinfer.conftest import CONFIG, write_folder

SMALL = {**CONFIG, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "float32"}
LENGTH = 32


def write_target(folder, mesh=None):
    """The shared tiny model of the engines' tests, its made-up weights in files."""
    write_folder(folder)
    graph = Graph.of(llama, llama.Config.from_hf(CONFIG), np.float32)
    save.save(folder, graph, random_weights(graph, 0, make_mesh({})), np.dtype(np.float32))
    return folder


def make_texts(count, seed=0):
    """Texts of a few tokens whose last ones are to be learned, in ascending runs: something to learn."""
    random = np.random.default_rng(seed)
    starts, sizes = random.integers(0, 200, count), random.integers(6, 14, count)
    return [Text(tuple(range(start, start + size)), 3) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]


@dataclass
class School:
    """Who teaches whom, and the step."""

    teacher: Teacher
    learner: Learner
    leaves: Any
    rows: Any
    texts: list[Text]

    def run(self, state, steps):
        """Some steps on the same rows, from a state of its own."""
        for step in range(steps):
            state = self.step(self.leaves, state, self.learner.put(self.rows), np.float32((step + 1) / self.learner.recipe.steps))
        return state

    @cached_property
    def step(self):
        """Compiled once."""
        return self.learner.compiled(self.leaves, self.learner.start())


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The config.json of a draft that does not exist yet."""
    path = tmp_path_factory.mktemp("small") / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def teacher_of(folder, mesh=None):
    graph = Graph.of(llama, llama.Config.from_hf(CONFIG), np.float32)
    return Teacher(folder, "target", graph, Placement(make_mesh(mesh or {})))


def enrol(folder, name, mesh=None, steps=12):
    """A school on a mesh."""
    teacher, texts = teacher_of(folder, mesh), make_texts(5)
    learner = Learner(teacher, draft.student(str(name), teacher, 1), Recipe(steps=steps, rows=2, learning_rate=0.02), LENGTH)
    return School(teacher, learner, teacher.load(), pack(texts, LENGTH, 2), texts)


@pytest.fixture(scope="session")
def school(target, small):
    return enrol(target, small)
