"""Drafts change how many steps an answer takes and nothing else: the same requests as without, under schedules that preempt and reject."""

from collections import Counter
from dataclasses import replace
from functools import reduce

import pytest

from jaxinfer.batch import DRAFTED, Row
from jaxinfer.engine import speculation
from jaxinfer.engine.costs import MODEL, PLAIN, WIDE, Costs
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.scheduler import Limits
from jaxinfer.engine.speculation import Candidate, Speculator
from jaxinfer.request import Request, joined
from tests.jaxinfer.conftest import scheduler
from tests.jaxinfer.engine.test_engine import GREEDY, VARIETY, assert_same, one, reference, run, tokens

__all__ = ["reference"]


@pytest.fixture
def arranged(speculating):
    """The engine with some of its proposers, behind another scheduler, with fresh counters."""
    usual, proposers = speculating.scheduler, speculating.speculator.proposers

    def arrange(*names, limits=usual.limits, pages=usual.pools[0].size):
        speculating.scheduler = scheduler(limits, pages)
        speculating.speculator.proposers = [proposer for proposer in proposers if type(proposer).__name__ in names] or proposers
        speculating.metrics.drafts = speculating.metrics.draft_tokens = speculating.metrics.accepted_tokens = 0
        speculating.metrics.accepted_at.clear()
        return speculating

    yield arrange
    speculating.scheduler, speculating.speculator.proposers = scheduler(usual.limits, usual.pools[0].size), proposers


@pytest.mark.parametrize("names", [("LookupProposer",), ("DraftProposer",), ()], ids=["lookup", "draft", "both"])
def test_the_same_answers_as_without_drafts(arranged, reference, names):
    engine = arranged(*names)
    assert_whole(run(engine, *VARIETY), reference)
    counts = engine.metrics
    assert 0 < counts.drafts <= counts.draft_tokens
    assert 0 < counts.accepted_tokens == sum(counts.accepted_at.values()) <= counts.draft_tokens
    if "DraftProposer" in names:  # the draft model is the model: every draft of a plain request stands
        assert counts.accepted_tokens > 0.5 * counts.draft_tokens


def test_preempted_and_in_chunks(arranged, reference):
    engine = arranged(limits=Limits(sequences=4, prefill_tokens=7, prefill_rows=2), pages=17)
    assert_whole(run(engine, *VARIETY), reference)
    assert engine.scheduler.preemptions > 0


def test_without_overlap(arranged, reference):
    engine = arranged()
    engine._depth = 0
    try:
        assert_whole(run(engine, *VARIETY), reference)
    finally:
        engine._depth = 1


def test_a_text_ends_inside_a_step(arranged, plain):
    engine = arranged("DraftProposer")
    want = one(plain, max_tokens=20)
    for length in (1, 2, 3, 5, 6):
        found = one(engine, max_tokens=length)
        assert tokens(found) == tokens(want)[:length]
        assert found[-1].output_tokens == length
    stop = tokens(want)[6]
    cut = one(engine, max_tokens=20, stop=replace(GREEDY.stop, token_ids=(stop,), ignore_eos=True))
    assert tokens(cut) == tokens(want)[: tokens(want).index(stop) + 1]
    assert cut[-1].stop_reason == stop
    assert max(len(output.token_ids) for output in found) > 1


def test_an_abort_between_steps_leaves_nothing_owned(arranged):
    engine = arranged()
    run(engine, *(Request(name, (5, 6) * 9, replace(GREEDY, max_tokens=30)) for name in "abc"), during=lambda step: engine.abort("b"))


def assert_whole(found, reference):
    """As `assert_same`, whatever the deltas."""
    assert_same(*({key: [reduce(joined, outputs)] for key, outputs in answers.items()} for answers in (found, reference)))
    for key in found:
        assert found[key][-1].output_tokens == len(tokens(found[key]))


# The policy, without an engine


class Fixed:
    """A proposer that always says the same."""

    DEVICE = False

    def __init__(self, drafts, kind="fixed", *, device=False):
        self.proposal, self.DEVICE = Proposal(drafts, kind), device
        self.forgotten = []

    def propose(self, sequence, count):
        return self.proposal._replace(tokens=self.proposal.tokens[:count])

    def rest(self):
        pass

    def forget(self, key):
        self.forgotten.append(key)


def costs(**seconds):
    table = Costs()
    for way in (PLAIN, WIDE, MODEL):
        for rows in (1, 4, 16):
            table.set(way, rows, seconds[way])
    return table


def speculator(*proposers, plain=1.0, wide=1.2, model=1.3):
    return Speculator(proposers, 3, 100, 1, costs(plain=plain, wide=wide, model=model), EngineMetrics())


def candidates(count=1, **hidden):
    line = scheduler(Limits(16, 64, 4), 65)
    return [Candidate(line.add(Request(str(number), (1, 2, 3))), **hidden) for number in range(count)]


def drafted(name, drafts):
    return Row(Request(name, (1,)), 0, 0, (1, *drafts), (1,), samples=True)


def test_drafts_are_given_while_they_pay():
    made = speculator(Fixed((7, 8, 9), "draft"))
    assert made.propose(candidates(2)) == {("0", 0): (7, 8, 9), ("1", 0): (7, 8, 9)}
    for _ in range(60):
        made.learn([(drafted("0", (7, 8, 9)), 1)])
    assert made.propose(candidates()) == {}
    for _ in range(60):
        made.learn([(drafted("0", (7, 8, 9)), 4)])
    assert made.propose(candidates()) == {("0", 0): (7, 8, 9)}
    assert (made.metrics.drafts, made.metrics.draft_tokens, made.metrics.accepted_tokens) == (120, 360, 180)
    assert made.metrics.accepted_at == Counter({0: 60, 1: 60, 2: 60})


def test_a_wide_step_that_costs_too_much_is_not_made_but_tried_now_and_then():
    made = speculator(Fixed((7, 8, 9)), wide=4.2)

    def steps_until_tried():
        return next(number for number in range(1000) if made.propose(candidates()))

    assert steps_until_tried() == 32  # what it costs was only measured at the start
    made.learn([(drafted("0", (7, 8, 9)), 1)])
    made.costs.take(WIDE, 1, 4.2)
    assert steps_until_tried() == 320  # (4.2 - 1) / 1 %
    made.learn([(drafted("0", (7, 8, 9)), 1)])
    assert not made.propose(candidates())
    made.always = True
    assert made.propose(candidates())


def test_ids_outside_of_the_vocabulary_are_refused():
    assert speculator(Fixed((7, 100, 3))).propose(candidates()) == {("0", 0): (7,)}
    assert speculator(Fixed((-3, 5))).propose(candidates()) == {}


def test_the_better_guess_is_taken_and_hidden_ones_only_where_they_may_be():
    text, model = Fixed((7, 8, 9), "lookup 2"), Fixed((DRAFTED,) * 3, "draft", device=True)
    made = speculator(text, model)
    for _ in range(40):
        made.history.take("x", "draft", 3, 3)
    assert made.propose(candidates()) == {("0", 0): (DRAFTED,) * 3}
    assert made.propose(candidates(hidden=False)) == {("0", 0): (7, 8, 9)}
    made.costs = costs(plain=1.0, wide=1.2, model=9.0)
    assert made.propose(candidates()) == {("0", 0): (7, 8, 9)}
    made.forget(("0", 0))
    assert text.forgotten == model.forgotten == [("0", 0)]


def test_a_setting_names_its_proposers():
    def names(*args, **more):
        return [type(proposer).__name__ for proposer in speculation.proposers(*args, **more)]

    assert names("lookup", model=True) == names("auto", model=False) == ["LookupProposer"]
    assert names("draft", model=True) == ["DraftProposer"]
    assert names("auto", model=True) == ["LookupProposer", "DraftProposer"]
    assert names("eagle", model=True, head=True) == ["EagleProposer"]
    assert names("auto", model=True, head=True) == ["LookupProposer", "EagleProposer"]
    assert isinstance(speculation.proposers("lookup", model=False)[0], LookupProposer)
