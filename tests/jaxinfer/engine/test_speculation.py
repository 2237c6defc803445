"""Drafts change how many steps an answer takes and nothing else: the same requests as without, under schedules that preempt and reject."""

from collections import Counter
from dataclasses import replace
from functools import reduce
from itertools import count

import pytest

from jaxinfer.batch import DRAFTED, Admission, Batch, Row
from jaxinfer.engine import speculation
from jaxinfer.engine.allowance import LEAST, SHARE, START
from jaxinfer.engine.costs import ALONE, FOLLOWED, KNOWN, PLAIN, PLAINS, Costs, Seen, Way
from jaxinfer.engine.guesses import Guess, Plan
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.pace import APART, FIRST, PATIENT, READING
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.resting import LONGEST, SHORTEST, TIMED, Rest, Span
from jaxinfer.engine.scheduler import Limits
from jaxinfer.engine.speculation import ASKING, ENTER, LOOK, SAVED, Bounds, Candidate, Speculator
from jaxinfer.engine.thoughts import UNSEEN
from jaxinfer.request import Request, joined
from jaxinfer.step.buckets import Bucket
from tests.jaxinfer.conftest import scheduler
from tests.jaxinfer.engine.test_engine import GREEDY, VARIETY, assert_same, one, reference, run, tokens

__all__ = ["reference"]


def still():
    """A clock for steps whose seconds a test says itself: asking takes none."""
    return 0.0


@pytest.fixture
def arranged(speculating):
    """The engine with some of its proposers, behind another scheduler, with fresh counters."""
    usual, proposers = speculating.scheduler, speculating.speculator.proposers

    def arrange(*names, limits=usual.limits, pages=usual.pools[0].size):
        speculating.scheduler, speculating._rest = scheduler(limits, pages), None
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


@pytest.mark.parametrize("pages", [64, 17])
def test_steps_begin_where_the_device_knows_that_the_one_before_ended(arranged, reference, monkeypatch, pages):
    engine = arranged("DraftProposer", limits=Limits(sequences=4, prefill_tokens=32, prefill_rows=2, unsettled=True), pages=pages)
    rows, forward = Counter(), engine.program.forward

    def counting(packed, drafting=None, **more):
        rows.update((row.unsettled, len(row.tokens) > 1) for _, row in packed.rows)
        return forward(packed, drafting, **more)

    monkeypatch.setattr(engine.program, "forward", counting)
    assert_whole(run(engine, *VARIETY), reference)
    assert rows[True, True] > 5 and rows[True, False] > 0  # with drafts behind drafts, and without any
    assert 0 < engine.metrics.accepted_tokens < engine.metrics.draft_tokens


def test_without_overlap(arranged, reference):
    engine = arranged()
    engine._depth = 0
    try:
        assert_whole(run(engine, *VARIETY), reference)
    finally:
        engine._depth = 1


@pytest.mark.parametrize("names", [("LookupProposer",), ("DraftProposer",)], ids=["lookup", "draft"])
def test_an_engine_rests_where_nothing_is_due(arranged, reference, monkeypatch, names):
    engine, rests, told = arranged(*names), [], []
    used = engine.speculator
    made = Speculator(used.proposers, used.bounds, used.costs, engine.metrics, unseen=used.unseen)
    monkeypatch.setattr(engine, "speculator", made)
    monkeypatch.setattr(engine, "_rest", None)
    begin = engine._resting
    monkeypatch.setattr(engine, "_resting", lambda *given: rests.append(begin(*given)) or rests[-1])
    monkeypatch.setattr(made.costs, "known", lambda rows: True)
    monkeypatch.setattr(made, "observe", told.append)
    for size in range(1, 9):
        made._paces[size].drafting, made._paces[size].apart, made._paces[size].out = False, APART + 1, True
        made.asking.charge(size, 1.0)
    assert_whole(run(engine, *VARIETY), reference)
    begun = [rest for rest in rests if rest is not None]
    apart = {id(rest): rest for rest in begun}.values()
    assert len(begun) > 10 and sum(rest.launched for rest in apart) == len(begun)
    assert len(rests) - len(begun) <= len(told) <= len(rests) - len(begun) + len(apart)  # one may be on its way when a rest ends


def test_where_drafts_do_not_pay_the_draft_model_is_left_out(arranged, reference, monkeypatch):
    engine, left = arranged("DraftProposer"), []
    speculator, forward = engine.speculator, engine.program.forward
    monkeypatch.setattr(speculator, "asks", lambda rows: len(left) % 3 == 0)  # then always drafts
    monkeypatch.setattr(speculator, "leaves_out", lambda batch: batch.decode_tokens == 1 and bool(batch.decodes or len(left) % 2))

    def noting(packed, drafting=None, *, alone):
        left.append(alone)
        return forward(packed, drafting, alone=alone)

    monkeypatch.setattr(engine.program, "forward", noting)
    assert_whole(run(engine, *VARIETY), reference)
    assert left.count(True) > 20 and left.count(False) > 10 and speculator.metrics.drafts > 10


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

    DEVICE, HOPED = False, 0.5

    def __init__(self, drafts, kind="fixed", *, device=False):
        self.proposal, self.DEVICE = Proposal(drafts, kind), device
        self.forgotten = []

    def propose(self, sequence, count):
        return self.proposal._replace(tokens=self.proposal.tokens[:count])

    def rest(self):
        pass

    def forget(self, key):
        self.forgotten.append(key)


WIDE, MODEL = Way(4), Way(4, hidden=True)


def costs(**seconds):
    table = Costs()
    for way, name in ((PLAIN, "plain"), (ALONE, "alone"), (WIDE, "wide"), (MODEL, "model"), (Way(2), "narrow")):
        for rows in (1, 4, 16) if name in seconds else ():
            table.set(way, rows, seconds[name])
    for rows in (1, 4, 16) * (KNOWN + 1):  # the first says nothing
        table.take(PLAIN, rows, seconds["plain"], far=True)
    return table


def speculator(*proposers, **seconds):
    known = costs(**{"plain": 1.0, "alone": 1.0, "wide": 1.2, "model": 1.3, **seconds})
    return Speculator(proposers, Bounds(3, 100, 1), known, EngineMetrics(), clock=still)


def candidates(count=1, **hidden):
    line = scheduler(Limits(16, 64, 4), 65)
    return [Candidate(line.add(Request(str(number), (1, 2, 3))), **hidden) for number in range(count)]


def drafted(name, drafts):
    return Row(Request(name, (1,)), 0, 0, (1, *drafts), (1,), samples=True)


def observed(made, *drafts, drawn=1, seconds=1.0, steady=True):
    """A step of one row has been made."""
    bucket = Bucket(0, 0, 1, 1 + len(drafts))
    made.observe(Seen(Batch((drafted("0", drafts),), ()), bucket, seconds, drawn=drawn, steady=steady))


def test_drafts_are_given_while_they_pay():
    made = speculator(Fixed((7, 8, 9), "draft"))
    assert made.propose(candidates(2)) == {("0", 0): (7, 8, 9), ("1", 0): (7, 8, 9)}
    made.allowance.charge(1, START)  # nothing is left for trials
    for _ in range(60):
        made.learn([(drafted("0", (7, 8, 9)), 1)])
    assert made.propose(candidates()) == {}
    for _ in range(60):
        made.learn([(drafted("0", (7, 8, 9)), 4)])
    assert made.propose(candidates()) == {("0", 0): (7, 8, 9)}
    assert (made.metrics.drafts, made.metrics.draft_tokens, made.metrics.accepted_tokens) == (120, 360, 180)
    assert made.metrics.accepted_at == Counter({0: 60, 1: 60, 2: 60})


def test_a_wide_step_that_costs_too_much_is_not_made_but_tried_now_and_then():
    made = speculator(Fixed((7, 8, 9)), wide=2.5)

    def steps_until_tried():
        for number in range(1000):
            if made.propose(candidates()):
                return number
            observed(made)
        return None

    least = 1.5 / SHARE  # 1.5 plain steps have to be saved
    assert least - 5 < steps_until_tried() < least + 5
    observed(made, 7, 8, 9, seconds=2.5)
    assert least - 5 < steps_until_tried() < least + 5
    made.always = True
    assert made.propose(candidates())


def test_few_rows_with_drafts_that_pay_are_enough_and_how_many_drafts_follows_from_history_and_costs():
    made = speculator(Fixed((7, 8, 9)), narrow=1.05)
    for _ in range(60):
        made.history.take(("0", 0), "fixed", 3, 3)
    for _ in range(60):
        made.history.take(("1", 0), "fixed", 0, 3)
    assert made.propose(candidates(2)) == {("0", 0): (7, 8, 9), ("1", 0): (7,)}
    made.costs = costs(plain=1.0, alone=1.0, wide=2.4, narrow=1.05)
    assert made.propose(candidates(2)) == {("0", 0): (7,), ("1", 0): (7,)}


def test_what_is_said_about_a_text_that_goes_on_meanwhile_is_worth_less():
    made = speculator(Fixed((7, 8, 9)), wide=1.6)
    made.allowance.charge(1, START)
    waiting = candidates()
    assert made.propose(waiting)
    waiting[0].sequence.pending = 1
    assert not made.propose(waiting)


def test_promises_are_believed_as_long_as_they_have_not_cost_too_much():
    made = speculator(Fixed((7, 8, 9)))
    made.history.take = lambda *args: None  # nothing is learnt
    made.costs.take = lambda way, rows, seconds, **more: seconds
    drafted = 0
    for _ in range(100):
        drafts = made.propose(candidates()).get(("0", 0), ())
        observed(made, *drafts, seconds=1.2)
        drafted += len(drafts) > 0
    assert 15 < drafted < 30  # each costs 0.2


def test_a_few_steps_without_drafts_show_what_they_cost_now():
    made = speculator(Fixed((7, 8, 9)))
    for _ in range(40):
        made.history.take("x", "fixed", 3, 3)
    steps = []
    for _ in range(5 * FIRST):
        drafts = made.propose(candidates()).get(("0", 0), ())
        observed(made, *drafts, drawn=1 + len(drafts), steady=steps[-1:] == [0])
        steps.append(len(drafts))
    first, then = [3] * FIRST, [0] * (LOOK + 1)  # the first of them is not launched behind another
    assert steps[: 3 * FIRST + 2 * len(then)] == first + then + first * 2 + then


def test_proposers_are_seldom_asked_where_there_is_nothing_to_gain():
    made, now = speculator(Fixed((7, 8, 9)), wide=9.0), [0.0]
    made.clock = lambda: now[0]
    made.allowance.charge(1, START)

    def rest():
        now[0] += 0.1

    made.proposers[0].rest, asked = rest, []
    for _ in range(PATIENT + 400):
        asked.append(made.asks(1))
        assert not asked[-1] or not made.propose(candidates())
        observed(made)
    assert all(asked[:PATIENT]) and abs(sum(asked[PATIENT:]) - 400 * ASKING / 0.1) < 3  # each takes a tenth of a step


def launched(made, batch):
    """The rest that a step belongs to, as in an engine."""
    if made.rest is not None and made.rest.takes(batch):
        made.enter(batch)
        return made.rest
    made.sees(batch)
    return None


def resting(proposer=None, **costs):
    """A speculator of one that does not pay and for which nobody can be asked for a while, and its next plain step."""
    made = speculator(proposer or Fixed((7, 8, 9)), wide=9.0, **costs)
    made.asking.charge(1, 1.0)
    pace = made._paces[1]
    pace.drafting, pace.apart = False, APART + 1
    return made, Batch((drafted("0", ()),), ())


PROMPTS = Batch((drafted("0", ()),), (drafted("1", ()),), (Admission(Request("1", (1,)), 0),))


def test_where_drafts_do_not_pay_nobody_looks_at_steps_for_a_while():
    made, batch = resting()
    assert not made.asks(1) and made.rest is not None
    rest, before, balance, earned = made.rest, made._paces[1].apart, made.allowance.balance(1), made.asking.balance(1)
    for number in range(SHORTEST):  # prompts and other rows do not matter
        assert not made.rest.due and launched(made, PROMPTS if number % 8 == 7 else batch) is rest
    steps = SHORTEST - SHORTEST // 8
    assert rest.due and not rest.over and launched(made, batch) is None and rest.over
    assert made._paces[1].apart == before + steps
    assert made.allowance.balance(1) == pytest.approx(balance + SHARE * steps)
    assert made.asking.balance(1) == pytest.approx(earned + ASKING * steps)


def test_the_longer_drafts_have_not_paid_the_longer_nobody_looks():
    made, batch = resting()
    lengths = []
    for _ in range(7):
        made.asking.charge(1, 10.0)
        assert not made.asks(1) and made.rest is not None
        lengths.append(made.rest.steps)
        while launched(made, batch) is not None:
            pass
        made._paces[1].asked(believed=False)
    assert lengths == [min(SHORTEST * 2**number, LONGEST) for number in range(7)] and lengths[-1] == lengths[-2]
    made._paces[1].asked(believed=True)
    assert made._paces[1].rest == LONGEST  # by belief alone they do not get shorter


def test_a_rest_that_a_draft_model_sits_out_ends_with_the_next_prompts():
    """It sees those from their beginning; what began before is lost to it."""
    made, batch = resting(Fixed((DRAFTED,) * 3, "draft", device=True), model=9.0)
    made._paces[1].out = True
    assert not made.asks(1)
    within = Batch((), (drafted("2", ()),), (Admission(Request("2", (1,)), 0),))
    assert launched(made, within) is not None
    for _ in range(SHORTEST):
        assert launched(made, batch) is not None
    assert launched(made, PROMPTS) is None and made.rest is None
    made.leaves_out(PROMPTS)
    lost = [made._about.lost(key) for key in (within.admissions[0].request.key, PROMPTS.admissions[0].request.key)]
    assert lost == [True, False] and not made.asks(1)


@pytest.mark.parametrize("change", [{"apart": APART}, {"looks": 1}, {"drafting": True}])
def test_nobody_rests_while_something_is_due(change):
    made, batch = resting()
    for name, value in change.items():
        setattr(made._paces[1], name, value)
    made.asks(1)
    assert made.rest is None and launched(made, batch) is None


def test_nothing_is_tried_behind_prompts():
    """How long it took to launch drafts would not be known."""
    made = speculator(Fixed((7, 8, 9)), wide=9.0)
    made.allowance.charge(1, -20.0)
    made._paces[1].drafting, made._paces[1].apart = False, APART + 1
    prompts, plain = Batch((), (drafted("0", ()),)), Batch((drafted("0", ()),), ())
    for batch, tried in ((prompts, False), (plain, True), (prompts, False)):
        launched(made, batch)
        assert made.asks(1) == tried
    made._paces[1].drafting = True
    assert made.asks(1) and not made.propose(candidates())
    launched(made, plain)
    assert made.asks(1) and made.propose(candidates())


@pytest.mark.parametrize("every", [1, 2, 5, 20, 50])
def test_under_a_load_that_never_ends_somebody_is_asked_all_the_same(every):
    made, plain = resting()
    made.asking.charge(1, -3.0)
    made.allowance.charge(1, -20.0)
    prompts, asked = Batch((drafted("0", ()),), (drafted("1", ()),)), 0
    for step in range(400):
        if step % every == 0:
            launched(made, prompts)
            continue
        if (made.rest is None or made.rest.due) and made.asks(1):
            asked += bool(made.propose(candidates()))
        launched(made, plain)
        observed(made)
    assert asked or every == 1


@pytest.mark.parametrize("batch", [Batch((), (drafted("1", ()),)), Batch((drafted("0", ()),), ())], ids=["prompts", "nothing"])
def test_drafts_launched_behind_a_step_that_says_nothing_are_charged_what_they_usually_take(batch):
    made = speculator(Fixed((DRAFTED,) * 3, "draft", device=True), model=1.5)
    made.unseen = True
    before, ratio = made.allowance.balance(1), made.costs.ratio(Way(4, hidden=True), 1)
    assert made.propose(candidates())
    made.observe(Seen(batch, Bucket(32, 1, 0) if batch.prefills else Bucket(0, 0, 1), 3.0 if batch.prefills else 0.0, 1, steady=False))
    rows = (drafted("0", (DRAFTED,) * 3),)
    made.observe(Seen(Batch(rows, ()), Bucket(0, 0, 1, 4), 1.1, 1))
    assert made.allowance.balance(1) == pytest.approx(before + 1 - ratio, abs=0.02) and made.costs.ratio(Way(4, hidden=True), 1) == ratio


def test_where_nothing_overlaps_an_engine_rests_as_well():
    """No step ever waits for one with drafts there."""
    (made, batch), now = resting(), [0.0]
    made.clock = lambda: now[0]
    made.asking.charge(1, -10.0)
    made.allowance.charge(1, -20.0)
    made.rest, taken, drafted_steps = None, 0, 0
    for _ in range(400):
        now[0] += 1.0
        if made.rest is not None and made.rest.takes(batch):
            taken += 1
            continue
        drafts = made.propose(candidates()) if made.asks(1) else {}
        if made.rest is None or not made.rest.takes(batch):
            made.sees(batch)
            observed(made, *next(iter(drafts.values()), ()), steady=True, seconds=3.0 if drafts else 1.0)
            drafted_steps += bool(drafts)
    assert taken > 150 and drafted_steps


def test_somebody_is_asked_again_where_no_rest_can_begin():
    made = speculator(Fixed((7, 8, 9)), wide=9.0)
    pace = made._paces[1]
    pace.drafting, pace.vain, pace.looks = False, 10, 0
    pace.apart = 0
    made.asking.charge(1, -3.0)
    assert made.asks(1) and made.rest is None  # what the last drafts cost is not settled yet
    pace.apart = APART + 1
    assert not made.asks(1) and made.rest is not None


def test_reading_on_is_not_in_vain():
    made = speculator(Fixed((7, 8, 9)), wide=9.0)
    made.allowance.charge(1, START)
    made.proposers[0].rest = lambda: True
    for _ in range(10):
        made.propose(candidates())
    assert made._paces[1].curious
    made.proposers[0].rest = lambda: False
    for _ in range(10):
        made.propose(candidates())
    assert not made._paces[1].curious


def test_who_has_always_more_to_read_is_asked_as_the_allowance_permits():
    """However sure of drafts an engine is at first: reading alone has never brought any."""
    made, ticks, asked = speculator(Fixed(())), count(), 0
    made.clock = lambda: 0.5 * next(ticks)  # so long is asked, beside steps of 1
    made.proposers[0].rest = lambda: True
    for _ in range(2000):
        if made.asks(1):
            asked += 1
            assert made.propose(candidates()) == {}
        made.rest = None
        observed(made, seconds=1.0 + made._since.seconds)
    assert asked == READING and not made._paces[1].drafting
    assert made.asking.balance(1) == pytest.approx(2000 * ASKING - READING * 0.5)


def test_reading_a_long_text_does_not_hold_up_its_drafts():
    made, ticks = speculator(Fixed((7, 8, 9))), count()
    made.clock = lambda: 1.5 * next(ticks)
    made.allowance.charge(1, START - LEAST - 0.5)  # little more may be lost
    made.proposers[0].rest, silent = lambda: True, made.proposers[0].propose
    made.proposers[0].propose = lambda sequence, drafts: None
    for _ in range(READING - 1):
        assert made.asks(1) and not made.propose(candidates())
        observed(made, seconds=1.0 + made._since.seconds)
    made.proposers[0].rest, made.proposers[0].propose = lambda: False, silent
    assert made.asks(1) and made.propose(candidates())


def test_nobody_is_asked_about_a_number_of_rows_of_which_nothing_is_known():
    """Some may have ended since it was decided to ask."""
    made, told = speculator(Fixed((7, 8, 9))), []
    made.proposers[0].propose = lambda sequence, drafts: told.append(sequence)
    made.costs.known = lambda size: size != 1
    assert made.propose(candidates()) == {} and not told and not made._since.seconds
    made.costs.known = lambda size: True
    assert made.propose(candidates()) == {} and told


def test_nobody_rests_while_a_draft_model_keeps_up_from_what_was_saved():
    made, _ = resting(Fixed((DRAFTED,) * 3, "draft", device=True), model=9.0)
    made.costs.set(FOLLOWED, 1, 1.1)
    pace, rows = made._paces[1], (drafted("0", ()),)
    pace.out = True
    made.allowance.charge(1, -SAVED)
    assert not made.leaves_out(Batch((), rows, (Admission(rows[0].request, 0),))) and not pace.out
    for _ in range(3):
        assert not made.asks(1) and made.rest is None and not made.leaves_out(Batch(rows, ()))
        made.observe(Seen(Batch(rows, ()), Bucket(0, 0, 1), 1.1, 1, followed=True))


def test_the_last_plain_steps_of_a_look_are_made_without_the_draft_model_once_for_each_sequence():
    made, step = speculator(Fixed((DRAFTED,) * 3, "draft", device=True)), Batch((drafted("0", ()),), ())
    made.costs.set(FOLLOWED, 1, 1.1)
    made.sees(Batch((), step.decodes, (Admission(step.decodes[0].request, 0),)))
    for bare in (True, False):
        made._paces[1].apart = 0
        made._paces[1].look(LOOK, 512)
        left = []
        while made._paces[1].looks:
            left.append(made.leaves_out(step))
            made.observe(Seen(step, Bucket(0, 0, 1), 1.0, 1, followed=not left[-1]))
        assert left == [False] * APART + [bare] * (LOOK - APART)
        made.observe(Seen(step, Bucket(0, 0, 1), 1.1, 1, followed=not made.leaves_out(step)))
        assert made._paces[1].looks == (ENTER - 1 if bare else 0)  # behind bare ones it is seen what keeping up takes
        made._paces[1].looks = 0


@pytest.mark.parametrize(("gained", "kept"), [(0.0, True), (0.5, True), (-0.1, False)])
def test_drafts_that_hardly_pay_go_on_while_the_account_holds_what_it_began_with(gained, kept):
    made = speculator(Fixed((7, 8, 9)), wide=1.0)
    made._planned = lambda *args: Plan(WIDE, {("0", 0): Guess(Proposal((7, 8, 9), "fixed"), 0.5, 1.0)}, 1.0, 1.0)
    made.allowance.charge(1, -gained)
    pace = made._paces[1]
    pace.apart = APART - 1  # others came before
    assert bool(made.propose(candidates())) is kept
    pace.apart = APART
    assert not made.propose(candidates())


def test_the_first_step_that_waits_is_charged_as_measured_at_the_start():
    made, step = speculator(Fixed((7, 8, 9)), alone=1.5), Batch((drafted("0", ()),), ())
    for price in (0.5, 1.4):
        before = made.allowance.balance(1)
        made._since = replace(made._since, waited=1)
        made.observe(Seen(step, Bucket(0, 0, 1), 2.4, 1, steady=False))
        assert made.allowance.balance(1) == pytest.approx(before - price, abs=0.01)


def test_where_what_was_said_has_come_true_somebody_is_asked_again():
    made = speculator(Fixed((7, 8, 9)), wide=9.0)
    (running,) = candidates()
    made._paces[1].vain = 10
    made.propose([running])
    for came, right in (((7, 8, 9), 1), ((7,), 2), ((7, 8, 5), 0), ((7, 8), 1)):
        running.sequence.tokens.extend(came)
        made.propose([running])
        assert made._paces[1].right == right and made._paces[1].curious is (right > 1)


@pytest.mark.parametrize("room", [0.5, 4.0])
def test_what_drafts_have_gained_is_spent_once_on_asking_for_more_first(room):
    made = speculator(Fixed((7, 8, 9)))
    gained = observed_gain(made)
    made.asking.charge(1, made.asking.balance(1) - made.asking.most + room)
    asking, trials = made.asking.balance(1), made.allowance.balance(1) - gained
    made._paces[1].drafting, made._paces[1].rest = False, LONGEST
    for _ in range(APART + 1):
        made.asks(1)
        observed(made)
    spent = min(gained, room)
    assert made.asking.balance(1) == pytest.approx(asking + spent, abs=0.1) and made._paces[1].rest == SHORTEST
    assert made.allowance.balance(1) == pytest.approx(trials + gained - spent, abs=0.1)  # both earn a little meanwhile


def observed_gain(made):
    """What a step with three drafts that stand brings an account, in plain steps."""
    before = made.allowance.balance(1)
    observed(made, 7, 8, 9, drawn=4)
    return made.allowance.balance(1) - before


def test_what_was_said_and_not_used_is_compared_with_what_came():
    made = speculator(Fixed((7, 8, 9)), wide=9.0)
    made.allowance.charge(1, START)
    (running,) = candidates()
    for _ in range(12):
        assert not made.propose([running])
        running.sequence.tokens.extend((7, 8))
    assert made.history.chance(("0", 0), "fixed", Fixed.HOPED) > 0.85
    for _ in range(40):
        made.propose([running])
        running.sequence.tokens.append(5)
    assert made.history.chance(("0", 0), "fixed", Fixed.HOPED) < 0.3
    made.forget(("0", 0))
    assert not made._about.thoughts


def test_drafts_count_for_their_kind_also_where_a_step_is_on_its_way():
    made = speculator(Fixed((DRAFTED,) * 3, "eagle", device=True))
    (running,) = candidates()
    running.sequence.pending = 1
    for _ in range(20):
        assert made.propose([running])
        made.learn([(drafted("0", (DRAFTED,) * 3), 4)])
    assert set(made.history.kinds) == {"eagle"} and made.history.chance(("0", 0), "eagle", Fixed.HOPED) > 0.8


def test_a_sequence_that_the_draft_model_lost_sight_of_gets_drafts_from_its_text_alone():
    text, model = Fixed((7, 8, 9), "lookup 2"), Fixed((DRAFTED,) * 3, "draft", device=True)
    made = speculator(text, model)
    made.costs.set(FOLLOWED, 1, 1.1)
    made.history.take("x", "draft", 3, 3)
    step = Batch((drafted("0", ()),), ())
    entering = Batch((), step.decodes, tuple(Admission(row.request, 0) for row in step.decodes))
    assert launched(made, entering) is None and not made.leaves_out(entering)  # drafts are thought to pay
    made._paces[1].drafting = False
    for _ in range(UNSEEN):
        assert made.leaves_out(step) and not made.leaves_out(Batch((drafted("0", (5,)),), ()))
    assert not made._about.lost(("0", 0))  # a few tokens may be missing
    assert made.leaves_out(step)
    made.allowance.charge(1, -SAVED)
    assert made.leaves_out(step)  # it is too late for that sequence
    assert not made.leaves_out(Batch((drafted("1", ()),), ()))  # another one can be tried, from what was saved up
    assert made.propose(candidates(2)) == {("0", 0): (7, 8, 9), ("1", 0): (DRAFTED,) * 3}
    made.forget(("0", 0))
    for _ in range(ENTER):
        assert not made.asks(1)  # it is seen first what keeping up takes
        observed(made)
    assert made.propose(candidates()) == {("0", 0): (DRAFTED,) * 3}


def test_what_a_plain_step_takes_is_seen_first_without_and_then_with_the_draft_model():
    proposers, seen = (Fixed((DRAFTED,) * 3, "draft", device=True),), []
    made = Speculator(proposers, Bounds(3, 100, 1), Costs(), EngineMetrics(), unseen=True, clock=still)
    for way, seconds in ((PLAIN, 0.5), (ALONE, 0.5), (FOLLOWED, 0.5), (MODEL, 0.6)):
        made.costs.set(way, 1, seconds)
    while not made.asks(1) and len(seen) < 100:
        step = Batch((drafted("0", ()),), ())
        seen.append(not made.leaves_out(step))
        made.observe(Seen(step, Bucket(0, 0, 1), 1.2 if seen[-1] else 1.0, drawn=1, followed=seen[-1]))
    assert seen == [False] * (KNOWN + 1) + [True] * ENTER
    assert made.costs.seconds(1) == 1.0 and made.costs.more(FOLLOWED, 1) == pytest.approx(0.2 * (ENTER - 1) / (ENTER + 1))


def test_what_launching_drafts_takes_is_theirs_though_an_earlier_step_was_slower_by_it():
    made, wide, plain = speculator(Fixed((7, 8, 9)), wide=1.0), Bucket(0, 0, 1, 4), Bucket(0, 0, 1)
    made.always = True
    for _ in range(40):
        for _ in range(5):
            made.observe(Seen(Batch((drafted("0", ()),), ()), plain, 1.0, drawn=1))
        assert made.propose(candidates())
        made.observe(Seen(Batch((drafted("0", ()),), ()), plain, 3.0, drawn=1, alike=False))
        made.observe(Seen(Batch((drafted("0", (7, 8, 9)),), ()), wide, 1.0, drawn=1, alike=False))
    assert made.costs.seconds(1) == pytest.approx(1.0, abs=1e-4)
    assert made.costs.ratio(WIDE, 1) == pytest.approx(3.0, abs=1e-3)
    assert made.allowance.balance(1) < LEAST


def test_a_machine_that_gets_slower_is_no_fault_of_drafts():
    made, slow = speculator(Fixed((7, 8, 9))), 4.0
    for _ in range(60):
        made.history.take("x", "fixed", 3, 3)
    looks = 0
    for number in range(120):
        drafts = made.propose(candidates()).get(("0", 0), ()) if made.asks(1) else ()
        looks += not drafts
        took = 1.2 if drafts else 1.0
        observed(made, *drafts, drawn=1 + len(drafts), seconds=slow * took if number > 20 else took)
    assert made.allowance.believes(1) and LOOK <= looks < 30 and 0.8 * slow < made.costs.seconds(1) <= slow


def test_a_question_that_was_held_up_is_not_charged_for_ever():
    made, now = speculator(Fixed((7, 8, 9)), wide=9.0), [0.0]
    made.clock = lambda: now[0]
    made.proposers[0].rest = lambda: now.__setitem__(0, now[0] + 100.0)
    made.propose(candidates())
    observed(made, seconds=101.0)
    assert made.allowance.balance(1) == pytest.approx(START - 2.5, abs=0.1) and made.costs.seconds(1) == 1.0


def test_rests_tell_what_drafts_are_compared_with():
    """And while they do, plain steps close behind drafts count no more; where drafts pay they do."""
    made, now = speculator(Fixed((7, 8, 9))), [0.0]
    for _ in range(30):
        observed(made, seconds=9.0)
    assert made.costs.seconds(1) == 9.0
    made.rest = Rest(1, Span(1, 1), 5 * TIMED, clock=lambda: now[0])
    while not made.rest.due:
        now[0] += 5.0
        assert made.rest.takes(Batch((drafted("0", ()),), ()))
    made.wake()
    assert made.costs.seconds(1) == 5.0 and made.rest is None
    for drafting in (False, True):
        made._paces[1].drafting = drafting
        observed(made, seconds=7.0)
        assert made.costs.seconds(1) == pytest.approx((5.0 * (PLAINS - 1) + 7.0) / PLAINS if drafting else 5.0)


def test_steps_with_prompts_are_charged_with_the_draft_models_part_and_with_waiting():
    made = speculator(Fixed((DRAFTED,) * 3, "draft", device=True), alone=1.5)
    made.costs.set(FOLLOWED, 1, 1.25)
    batch, bucket = Batch((), (drafted("0", ()),)), Bucket(32, 1, 0)
    made.observe(Seen(batch, bucket, 10.0, 1, followed=True))
    assert made.allowance.balance(1) == START - 2.0  # a fifth of ten plain steps
    assert made.propose(candidates())
    made.observe(Seen(batch, bucket, 10.0, 1, steady=False))
    assert made.allowance.balance(1) == pytest.approx(START - 2.5, abs=0.01)
    for _ in range(2):
        made.observe(Seen(batch, bucket, 10.0, 1, followed=True))
    assert made.leaves_out(batch)  # too dear


def test_what_happened_before_a_rest_is_due_to_nobody():
    made = speculator(Fixed((7, 8, 9)))
    assert made.propose(candidates())
    made.observe(Seen(Batch((drafted("0", ()),), ()), Bucket(0, 0, 1), 0.0, 1))
    observed(made, seconds=5.0)
    assert made._since.owed == 0.0 and made._since.seconds == 0.0


def test_rows_with_a_grammar_show_what_plain_steps_take(arranged):
    engine = arranged("LookupProposer")
    engine.speculator.always = False
    engine.speculator.costs._plains.clear()
    engine.speculator._paces.clear()
    run(engine, *[request for request in VARIETY if request.params.grammar is not None])
    assert engine.speculator.costs.known(1)


@pytest.mark.parametrize(("stands", "later"), [(2, True), (0, False)])
def test_a_draft_model_never_tried_is_hoped_to_be_good_and_judged_by_a_few_trials(stands, later):
    made = speculator(DraftProposer(), plain=1.0, model=1.8)
    drafts = (DRAFTED,) * 3
    for _ in range(4):
        if made.propose(candidates()):
            made.learn([(drafted("0", drafts), 1 + stands)])
            observed(made, *drafts, drawn=1 + stands, seconds=1.8)
    assert made.metrics.drafts == (4 if later else 2)  # by even chances three drafts promise less than they cost
    assert bool(made.propose(candidates())) is later and Fixed.HOPED < DraftProposer.HOPED


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
    made.costs = costs(plain=1.0, alone=1.0, wide=1.2, model=9.0)
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
