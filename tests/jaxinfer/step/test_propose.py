"""The draft model's program: with the model as its own draft, what it proposes is what the model says."""

from dataclasses import replace

from jaxinfer.request import Request, SamplingParams
from jaxinfer.step.forward import Demand
from tests.jaxinfer.engine.test_engine import GREEDY, run, tokens
from tests.jaxinfer.engine.test_speculation import arranged

__all__ = ["arranged"]


def accepted(engine, params):
    run(engine, Request("one", (3, 1, 4, 1, 5), params))
    return engine.metrics.accepted_tokens / engine.metrics.draft_tokens


def test_a_model_agrees_with_itself_greedy_and_drawn(arranged):
    drawn = SamplingParams(seed=3, max_tokens=25)
    for params in (replace(GREEDY, max_tokens=25), drawn, replace(drawn, top_k=9, top_p=0.9)):
        assert accepted(arranged("DraftProposer"), params) > 0.9, Demand.of(params)


def test_what_is_proposed_does_not_change_the_slots(arranged, plain):
    found = run(arranged("DraftProposer"), Request("a", (9, 8, 7), GREEDY), Request("b", (9, 8), SamplingParams(seed=1, max_tokens=9)))
    same = run(plain, Request("a", (9, 8, 7), GREEDY), Request("b", (9, 8), SamplingParams(seed=1, max_tokens=9)))
    assert {key: tokens(outputs) for key, outputs in found.items()} == {key: tokens(outputs) for key, outputs in same.items()}
