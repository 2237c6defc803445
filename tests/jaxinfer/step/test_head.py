"""The head in pages against a slow twin over contiguous arrays: prompts in chunks, drafts that stand or fall, pages shared and copied."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer.batch import DRAFTED, Batch, Row
from jaxinfer.cache.kv import PoolShape
from jaxinfer.models import eagle, llama
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request
from jaxinfer.sharding import make_mesh, named
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.forward import Demand
from jaxinfer.step.inputs import pack
from jaxinfer.step.keys import COPY, POOL, ProgramConfig, ProposeKey
from jaxinfer.step.program import Program
from tests.eagle_twin import EagleTwin

PREFILL, VERIFY = Bucket(8, 2, 0), Bucket(0, 0, 2, 4)
DRAFTS = VERIFY.decode_tokens - 1
OWN_EMBEDDING = {"hidden_size": 32, "own_embedding": True}


class Texts:
    """Rows of a program by hand: texts, and what of them lies in which pages."""

    def __init__(self, program, twin):
        self.program, self.twin = program, twin
        self.texts, self.done, self.pages = {}, {}, {}

    def replica(self, name):
        return self.program.config.pool.replicas - 1 if name in ("b", "copied") else 0

    def begin(self, name, text, pages, done=0):
        self.texts[name], self.done[name], self.pages[name] = list(text), done, pages

    def rows(self, **tokens):
        rows = []
        for slot, (name, own) in enumerate(tokens.items()):
            start = self.done[name]
            pages = self.pages[name][: -(-(start + len(own)) // 4)]
            rows.append(Row(Request(name, (1,)), slot, start, own, pages, samples=True, replica=self.replica(name)))
        return tuple(rows)

    def prefill(self, **counts):
        """Compute so many tokens of each text."""
        parts = {name: tuple(self.texts[name][self.done[name] :][:count]) for name, count in counts.items()}
        self.program.forward(pack(Batch((), self.rows(**parts)), self.program.config.shapes(PREFILL)))
        for name, count in counts.items():
            self.done[name] += count

    def verify(self, *names):
        """Let the head think behind each text's last token; what it says must be what the twin says. Nothing of it stands yet."""
        batch = Batch(self.rows(**{name: (self.texts[name][-1], *(DRAFTED,) * DRAFTS) for name in names}), ())
        packed = pack(batch, self.program.config.shapes(VERIFY))
        tokens = np.asarray(self.program.forward(packed, Demand.GREEDY).rows.tokens)
        found = {row.request.id: tokens[index, 1:].tolist() for index, row in packed.rows}
        assert found == {name: self.twin.drafts(self.texts[name], DRAFTS) for name in names}
        return found

    def stand(self, name, tokens):
        """Tokens that were drawn behind the last one: drafts as far as they are the same."""
        self.done[name] += len(tokens)
        self.texts[name] += tokens


def texts(mesh=None, **head):
    mesh = make_mesh(mesh or {})
    target = Graph.of(llama, llama.TINY, "float32")
    config = replace(eagle.Config.beside(target.config, draft_vocab=40), **head)
    graph = Graph.of(eagle, config, "float32")
    weights = random_weights(graph, 7, mesh)
    weights["d2t"] = jax.device_put(np.arange(40, dtype=np.int32) * 2, named(graph.specs[graph.names.index("d2t")], mesh))
    leaves = target.leaves(random_weights(target, 3, mesh)) + graph.leaves(weights)
    program = Program(ProgramConfig(
        target, Placement(mesh), PoolShape(pages=17, page_size=4, replicas=mesh.shape["data"]), (PREFILL, VERIFY), max_sequences=2,
        max_tokens=32, threads=2, draft=graph,
    ))  # fmt: skip
    program.compile(lambda *_: None, [PREFILL, VERIFY, ProposeKey(VERIFY, greedy=True), COPY, POOL])
    program.load(leaves)
    return Texts(program, EagleTwin(target, graph, leaves))


@pytest.mark.parametrize(("mesh", "head"), [
    ({}, {}),
    pytest.param({"data": 2, "tensor": 2}, {}, marks=pytest.mark.ci),
    pytest.param({}, OWN_EMBEDDING, marks=pytest.mark.ci),
], ids=["", "mesh", "own embedding"])  # fmt: skip
def test_drafts_are_those_of_the_twin(mesh, head):
    made = texts(mesh, **head)
    made.begin("a", (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), [1, 2, 3, 4, 5, 6])
    made.begin("b", (2, 7, 1, 8, 2), [7, 8, 9, 10])
    made.prefill(a=5, b=3)
    made.prefill(a=5, b=1)  # all but the last token of each
    first = made.verify("a", "b")
    made.stand("a", [*first["a"][:2], 77])  # two drafts stand, then something else comes
    made.stand("b", [99])  # none stands
    second = made.verify("b", "a")
    made.stand("b", [*second["b"], 5])  # all stand
    made.stand("a", [second["a"][0], 11])
    made.verify("a", "b")
    made.begin("shared", [*made.texts["a"][:8], 9, 9, 9], [1, 2, 11, 12], done=8)  # pages of a prefix that is known
    made.program.copy_pages([(made.replica("b"), 8, 13)])
    made.begin("copied", [*made.texts["b"][:6], 4, 4], [7, 13, 14], done=6)  # half a page, with b's own further text in it
    made.prefill(shared=2, copied=1)
    made.verify("shared", "copied")
    assert len({tuple(drafts) for drafts in (*first.values(), *second.values())}) > 2
