"""The head as a proposer: places for drafts; and whole engines that draft with one, whose tokens are those of engines without."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.batch import DRAFTED
from jaxinfer.config import MeshShape, SpeculationConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.proposers.eagle import EagleProposer
from jaxinfer.engine.proposers.proposal import Proposer
from jaxinfer.engine.scheduler import Limits
from jaxinfer.request import Request
from tests.eagle_twin import EagleTwin
from tests.jaxinfer.conftest import scheduler, settings
from tests.jaxinfer.engine.test_engine import GREEDY, VARIETY, reference, run, tokens
from tests.jaxinfer.engine.test_speculation import assert_whole

__all__ = ["reference"]

CONVERSATION = [
    Request(name, tuple(range(9)) + own, replace(GREEDY, max_tokens=22, repetition_penalty=1 + 0.1 * index), index=index)
    for name, own, index in (("a", (), 0), ("a", (), 1), ("a", (), 2), ("b", (40, 41), 0), ("c", (9, 9, 9, 7), 0), ("d", (40, 41, 5), 0))
]


def test_it_promises_drafts_that_the_host_does_not_know():
    proposer, sequence = EagleProposer(), scheduler(Limits(1, 8, 1), 9).add(Request("a", (1, 2)))
    assert isinstance(proposer, Proposer) and proposer.DEVICE
    assert proposer.propose(sequence, 3) == ((DRAFTED,) * 3, "eagle")


@pytest.fixture(scope="module")
def eagle(folder):
    """An engine that drafts with a made-up head and nothing else, whatever it costs."""
    engine = Engine(settings(folder, speculation=SpeculationConfig("eagle", None, 2)))
    engine.speculator.always = True
    return engine


@pytest.mark.ci
@pytest.mark.parametrize("limits", [None, Limits(sequences=4, prefill_tokens=7, prefill_rows=2)], ids=["", "cramped"])
def test_the_same_answers_as_without_drafts(eagle, reference, limits):
    eagle.scheduler = scheduler(limits or Limits(4, 32, 4), 65 if limits is None else 17)
    before = eagle.metrics.draft_tokens
    assert_whole(run(eagle, *VARIETY), reference)
    assert eagle.metrics.draft_tokens > before
    assert limits is None or eagle.scheduler.preemptions > 0


@pytest.mark.ci
@pytest.mark.parametrize("pages", [65, 17])
def test_every_draft_is_the_twins_whatever_came_between(eagle, monkeypatch, pages):
    """Prefixes that are cached, choices that share half a page, preemption: the head always saw true features."""
    eagle.scheduler, seen, forward = scheduler(Limits(4, 11, 2), pages), [], eagle.program.forward

    def recorded(packed, drafting=None, **how):
        computed = forward(packed, drafting, **how)
        for index, row in packed.rows if drafting is not None else ():
            if DRAFTED in row.tokens:
                seen.append((row.request.key, row.start, np.asarray(computed.rows.tokens)[index, 1 : len(row.tokens)].tolist()))
        return computed

    monkeypatch.setattr(eagle.program, "forward", recorded)
    found = run(eagle, *CONVERSATION)
    found |= run(eagle, *(replace(request, id=f"{request.id} again", prompt=(*request.prompt, 3, 3)) for request in CONVERSATION[3:]))
    config = eagle.program.config
    twin = EagleTwin(config.graph, config.draft, eagle.program._leaves)
    prompts = {request.id: request.prompt for request in CONVERSATION}
    assert len(seen) > 100 and eagle.scheduler.reused > 0
    assert pages == 65 or eagle.scheduler.preemptions > 0
    for key, start, drafts in seen:
        again = key[0].endswith(" again")
        text = (*prompts[key[0].removesuffix(" again")], *((3, 3) if again else ()), *tokens(found[key]))
        assert drafts == twin.drafts(text[: start + 1], len(drafts)), (key, start)


@pytest.mark.ci
def test_on_a_mesh_beside_a_quantised_model(folder):
    made = {}
    for speculate in ("off", "eagle"):
        wanted = settings(folder, mesh=MeshShape(2, 2), sequences=2, quantize="int8", speculation=SpeculationConfig(speculate))
        engine = Engine(wanted)
        if engine.speculator is not None:
            engine.speculator.always = True
        made[speculate] = run(engine, *VARIETY)
    assert_whole(made["eagle"], made["off"])
