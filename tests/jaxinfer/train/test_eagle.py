"""A head learns what it will do: unrolled as the slow twin goes on, a loss that falls, and a folder that serves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint import manifest, read
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.models import eagle as head
from jaxinfer.models.graph import Graph
from jaxinfer.planner import sizing
from jaxinfer.train import eagle
from jaxinfer.train.learner import Learner, Recipe
from jaxinfer.train.rows import Text, pack
from jaxinfer.train.student import Lesson, Student
from tests.eagle_twin import EagleTwin
from tests.jaxinfer.train.conftest import LENGTH, make_texts, teacher_of


def learner_of(folder, drafts=None, **recipe):
    teacher = teacher_of(folder)
    student = eagle.student("eagle", teacher, 5)
    if drafts is not None:
        student = replace(student, graph=Graph.of(head, head.Config.beside(teacher.graph.config, drafts), np.float32))
    return Learner(teacher, student, Recipe(rows=2, **recipe), LENGTH)


def test_it_is_unrolled_as_it_serves(target):
    learner = learner_of(target)
    teacher, student, random = learner.teacher, learner.student, np.random.default_rng(0)
    assert isinstance(student, Student) and student.vocabulary is None
    leaves, weights = teacher.load(), student.begin()
    texts = [Text(tuple(random.integers(0, 272, size).tolist()), 1) for size in (13, 9, 20)]
    rows = pack(texts, LENGTH, 2)

    @jax.jit
    def run(leaves, weights, rows):
        context = learner.context(rows["positions"], student=True)
        seen = teacher.look(leaves, rows["tokens"], context, student.tapped)
        return jnp.stack(student.hidden(weights, Lesson(rows["tokens"], context, seen.features, leaves)))

    found = np.asarray(run(leaves, weights, learner.put(rows)))
    twin = EagleTwin(teacher.graph, student.graph, (*leaves, *student.graph.leaves(weights)))
    owner = rows.owner.reshape(-1)
    for number, text in enumerate(texts):
        own = found[:, owner == number]
        for place in (0, 1, len(text.tokens) - eagle.DEPTH):
            wanted = twin.thoughts(text.tokens[: place + 1], eagle.DEPTH, [*text.tokens[place + 1 :], 0])
            np.testing.assert_allclose(own[:, place], [hidden for _, hidden in wanted], atol=1e-4)


@pytest.mark.parametrize("drafts", [None, 64])
def test_what_is_saved_is_served(target, tmp_path, drafts):
    student = learner_of(target, drafts).student
    weights = student.begin()
    manifest.write(tmp_path, student.save(tmp_path, weights))
    target = Graph.of(student.target.module, student.target.config, "float32")
    graph = sizing.beside(target, read.read_config(tmp_path), tmp_path, EngineConfig(ModelConfig("any")), "cpu")
    assert graph.config == student.graph.config
    loaded = read.load(tmp_path, graph, student.placement.mesh)
    assert ("d2t" in loaded) == (drafts is not None) and (tmp_path / "tokenizer.json").is_file()
    assert all(np.array_equal(loaded[name], weights[name].astype(jnp.bfloat16).astype(np.float32)) for name in weights)


@pytest.mark.ci
@pytest.mark.parametrize("drafts", [None, 250])
def test_the_loss_falls(target, drafts):
    learner, texts = learner_of(target, drafts, steps=20, learning_rate=0.02), make_texts(5)
    leaves, state = learner.teacher.load(), learner.start()
    step, rows = learner.compiled(leaves, state), pack(texts, LENGTH, 2)
    for _ in range(20):
        state = step(leaves, state, learner.put(rows), np.float32(0.5))
    losses = np.asarray(state.losses)
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
