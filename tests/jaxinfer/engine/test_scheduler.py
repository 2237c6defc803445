"""The scheduler's decisions one by one; `tests/jaxinfer/selftest` drives it with random traffic."""

from array import array

import pytest

from jaxinfer.batch import DRAFTED, LAST_SAMPLED, PageCopy
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import PrefixIndex
from jaxinfer.engine import policies
from jaxinfer.engine.scheduler import Limits, Scheduler
from jaxinfer.request import Request, SamplingParams
from tests.counting import work

PAGE = 4


def scheduler(pages=14, policy="fcfs", prefix=True, **changes):
    limits = Limits(**{"sequences": 4, "prefill_tokens": 16, "prefill_rows": 2, **changes})
    return Scheduler(limits, [PagePool(pages, PAGE, PrefixIndex(PAGE) if prefix else None) for _ in range(limits.replicas)], policy)


def prompt(name, length, index=0, first=None, **changes):
    """A prompt of its own, or one that begins with `first`."""
    head = ord(name[0]) * 100 if first is None else first
    return Request(name, tuple(range(head, head + length)), index=index, **changes)


def done(line, batch, token=7):
    """Commit a batch; every row that samples draws the same token."""
    sequences = line.commit(batch)
    for row, sequence in zip(batch.rows, sequences, strict=True):
        if row.samples and sequence is not None:
            line.append(sequence, token)
    line.check()
    return sequences


def step(line):
    batch = line.schedule()
    done(line, batch)
    return batch


def ids(rows):
    return [row.request.id for row in rows]


def test_an_idle_scheduler_has_nothing_to_do():
    line = scheduler()
    assert line.schedule() is None
    line.finish(line.add(prompt("a", 3)))
    assert line.schedule() is None
    assert (line.running, line.waiting, line.usage, line.uncommitted) == (0, 0, 0.0, 0)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    line = scheduler()
    line.add(prompt("short", 3))
    assert [row.samples for row in step(line).prefills] == [True]
    line.add(prompt("long", 35))
    chunks = []
    for _ in range(3):
        batch = step(line)
        assert [(row.request.id, row.tokens) for row in batch.decodes] == [("short", (LAST_SAMPLED,))]
        chunks += [(row.start, len(row.tokens), row.samples) for row in batch.prefills]
    assert chunks == [(0, 16, False), (16, 16, False), (32, 3, True)]


def test_the_last_token_of_a_prompt_alone_has_a_decode_row():
    line = scheduler(prefill_tokens=4)
    line.add(Request("a", (10, 11, 12, 13, 14)))
    assert [tuple(row.tokens) for row in step(line).prefills] == [(10, 11, 12, 13)]
    batch = step(line)
    assert [(row.start, row.tokens, row.samples) for row in batch.decodes] == [(4, (14,), True)]
    assert batch.prefills == ()


def test_a_step_is_scheduled_before_the_one_before_is_known():
    line = scheduler()
    sequence = line.add(prompt("a", 3), limit=3)
    first = line.schedule()
    second = line.schedule()
    assert [(row.start, row.tokens) for row in second.decodes] == [(3, (LAST_SAMPLED,))]
    assert (sequence.pending, sequence.in_flight, sequence.computed, sequence.length) == (2, 2, 4, 5)
    done(line, first)
    third = line.schedule()
    assert [row.start for row in third.decodes] == [4]
    assert line.schedule() is None, "its last token is on its way"
    done(line, second)
    assert line.schedule() is None
    done(line, third)
    assert sequence.output == [7, 7, 7]


def test_batches_are_committed_in_order_and_once():
    line = scheduler()
    line.add(prompt("a", 3))
    first, second = line.schedule(), line.schedule()
    with pytest.raises(ValueError, match="in the order"):
        line.commit(second)
    line.commit(first)
    with pytest.raises(ValueError, match="once each"):
        line.commit(first)


def test_what_a_launched_step_uses_comes_free_with_its_last_commit():
    line = scheduler(prefix=False)
    sequence = line.add(prompt("a", 7))
    first, second = line.schedule(), line.schedule()
    line.finish(sequence)
    line.finish(sequence)
    assert sequence.ended and line.running == 0
    assert line.pools[0].owned == 2
    assert done(line, first) == [None]
    assert line.pools[0].owned == 2
    assert done(line, second) == [None]
    assert line.pools[0].owned == 0
    assert (sequence.slot, len(sequence.pages)) == (-1, 0)


def test_the_one_that_arrived_last_is_preempted_and_comes_back_first():
    line = scheduler(pages=7, prefix=False)
    old, new = line.add(prompt("old", 8), 9), line.add(prompt("new", 6), 9)
    step(line)
    line.add(prompt("late", 1))
    while not new.preemptions:
        batch = step(line)
    assert ids(batch.rows) == ["old"]
    assert (new.slot, list(new.pages), new.computed, new.output) == (-1, [], 0, [7] * 5)
    assert (line.preemptions, line.waiting) == (1, 2)
    line.finish(old)
    batch = step(line)
    assert [(a.request.id, a.generated) for a in batch.admissions] == [("new", (7,) * 5), ("late", ())]
    assert len(batch.prefills[0].tokens) == 11


def test_a_victim_in_flight_gives_its_pages_at_commit_and_its_token_is_kept():
    line = scheduler(pages=7, prefix=False)
    old, new = line.add(prompt("old", 8), 9), line.add(prompt("new", 8), 9)
    before, batch = None, line.schedule()
    while not new.preemptions:
        if before is not None:
            done(line, before)
        before, batch = batch, line.schedule()
    assert batch is None and old.running, "the pages it wants are still read"
    assert (new.pending, new.in_flight, new.computed, line.pools[0].available) == (1, 1, 0, 0)
    known = len(new.output)
    line.add(prompt("late", 1))
    assert line.schedule() is None, "nobody takes the place of the preempted before its token is known"
    done(line, before)
    assert (len(new.output), new.pending, line.pools[0].available) == (known + 1, 0, 3)
    assert ids(line.schedule().rows) == ["old"]


def test_the_least_urgent_is_the_victim_but_not_for_ever():
    line = scheduler(pages=5, prefix=False)
    line.add(prompt("urgent", 1, priority=-1), 12)
    late = line.add(prompt("late", 1, priority=1), 12)
    while late.running or not late.preemptions:
        step(line)
    late.preemptions = 4
    assert late.standing[0] < -1


def test_nobody_overtakes_the_one_that_does_not_fit():
    line = scheduler(pages=6)
    line.add(prompt("a", 12), 4)
    step(line)
    line.add(prompt("big", 12))
    line.add(prompt("small", 1))
    assert step(line).admissions == ()
    assert line.waiting == 2


@pytest.mark.parametrize(("limit", "admitted"), [(1, ["b"]), (5, ["b"]), (6, []), (100, [])])
def test_admission_leaves_room_for_those_that_run(limit, admitted):
    line = scheduler(pages=6)
    line.add(prompt("a", 8), limit)
    step(line)
    line.add(prompt("b", 8), 1)
    assert [admission.request.id for admission in step(line).admissions] == admitted


def test_replicas_fill_evenly_and_a_known_beginning_goes_before():
    line = scheduler(replicas=2, prefill_rows=4)
    line.add(prompt("large", 12, first=0), 1)
    step(line)
    for name in "abc":
        line.add(prompt(name, 4), 1)
    line.add(prompt("hit", 10, first=0), 1)
    batch = step(line)
    assert {row.request.id: row.replica for row in batch.rows} == {"a": 1, "b": 1, "c": 1, "hit": 0}
    assert [len(row.tokens) for row in batch.rows if row.request.id == "hit"] == [2]


def test_a_common_beginning_is_computed_once_even_within_one_step():
    line = scheduler(prefill_rows=4)
    for name in "abc":
        line.add(prompt(name, 11, first=0))
    batch = step(line)
    assert [(row.start, len(row.tokens)) for row in batch.prefills] == [(0, 11), (8, 3), (8, 2)]
    assert len({tuple(row.pages[:2]) for row in batch.prefills}) == 1
    assert (line.looked_up, line.reused, line.pools[0].owned) == (33, 16, 5)


def test_what_was_generated_is_known_as_well():
    line = scheduler()
    sequence = line.add(prompt("a", 3, first=0), 6)
    for _ in range(6):
        step(line)
    line.finish(sequence)
    assert (line.pools[0].cached, line.usage) == (2, 0.0)
    again = line.add(Request("b", (0, 1, 2, 7, 7, 7, 7, 7, 9)), 1)
    assert again.cached == 8
    assert [(row.start, row.tokens) for row in step(line).decodes] == [(8, (9,))]


def test_salts_do_not_share():
    line = scheduler()
    line.finish(line.add(prompt("a", 9, first=0, cache_salt="x")))
    for name, salt, reused in (("b", "x", 0), ("c", "x", 8), ("d", "", 0), ("e", "y", 0)):
        sequence = line.add(prompt(name, 9, first=0, cache_salt=salt), 1)
        step(line)
        assert sequence.reused == reused
        line.finish(sequence)


def test_a_prompt_that_is_scored_shares_nothing_with_those_before():
    line = scheduler(pages=24, prefill_rows=4)
    line.finish(line.add(prompt("a", 9, first=0)))
    scored = SamplingParams(prompt_logprobs=0)
    for index in range(2):
        line.add(prompt("b", 9, index, first=0, params=scored), 1)
    batch = step(line)
    assert [(row.start, len(row.tokens)) for row in batch.prefills] == [(0, 9), (0, 7)]
    assert batch.copies == () and line.reused == 0


def test_poisoned_pages_are_never_found_and_may_be_wiped():
    line = scheduler()
    sound = line.add(prompt("a", 5, first=0), 1)
    step(line)
    line.finish(sound)
    ill = line.add(prompt("b", 10, first=0), 1)
    step(line)
    wiped = line.poison(ill)
    assert wiped == sorted(ill.pages[1:])
    line.finish(ill)
    line.check()
    again = line.add(prompt("c", 10, first=0), 1)
    step(line)
    assert again.reused == 4


def test_pages_that_another_sequence_has_are_not_wiped():
    line = scheduler(prefill_rows=4)
    ill, other = line.add(prompt("a", 10, first=0)), line.add(prompt("b", 10, first=0))
    step(line)
    assert line.poison(ill) == [ill.pages[2]]
    assert list(ill.pages[:2]) == list(other.pages[:2])
    line.finish(ill)
    step(line)
    assert line.add(prompt("c", 10, first=0)).cached == 0


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(("length", "shared", "copied"), [(10, 2, 1), (8, 1, 1), (9, 2, 0), (3, 0, 1), (1, 0, 0)])
def test_siblings_wait_for_the_first_and_compute_one_token(prefix, length, shared, copied):
    line = scheduler(prefix=prefix, pages=24)
    first, *others = [line.add(prompt("many", length, index=index), 8) for index in range(3)]
    line.add(prompt("other", 3), 8)
    assert line.waiting == 4
    assert [row.request.key for row in step(line).rows] == [("many", 0), ("other", 0)]
    batch = step(line)
    assert [(row.start, row.tokens, row.samples) for row in batch.decodes[2:]] == [(length - 1, first.request.prompt[-1:], True)] * 2
    assert all(list(other.pages[:shared]) == list(first.pages[:shared]) for other in others)
    assert not set(others[0].pages[shared:]) & {*first.pages, *others[1].pages}
    assert batch.copies == tuple(PageCopy(first.pages[shared], other.pages[shared], 0) for other in others) * copied
    assert line.waiting == 0
    for sequence in (first, *others):
        line.finish(sequence)
    line.check()


def test_the_page_that_a_copy_reads_stays_until_the_copy_has_run():
    line = scheduler(prefix=False)
    first, second = [line.add(prompt("many", 3, index=index), 1) for index in range(2)]
    one = line.schedule()
    two = line.schedule()
    assert len(two.copies) == 1
    done(line, one)
    line.finish(first)
    assert line.pools[0].owned == 2
    done(line, two)
    assert line.pools[0].owned == 1
    line.finish(second)
    assert line.usage == 0.0


@pytest.mark.parametrize("moment", ["waiting", "computing"])
def test_siblings_proceed_alone_when_the_first_ends(moment):
    line = scheduler(prefix=False, prefill_tokens=4)
    first, *others = [line.add(prompt("many", 10, index=index), 2) for index in range(3)]
    if moment == "computing":
        step(line)
    line.finish(first)
    assert line.waiting == 2
    batch = step(line)
    assert [row.request.index for row in batch.prefills] == [1]
    assert batch.copies == ()
    line.finish(others[0])
    line.finish(others[1])
    assert line.waiting == 0 and line.find("many") == []


def test_find_gives_every_choice_of_a_request_wherever_it_is():
    line = scheduler()
    for index in range(6):
        line.add(prompt("many", 4, index))
    line.add(prompt("other", 4))
    step(line)
    assert (line.running, line.waiting) == (2, 5)
    assert [sequence.request.index for sequence in line.find("many")] == list(range(6))
    assert line.find("nobody") == []


def test_rows_name_the_sequences_own_pages_instead_of_copying_them():
    line = scheduler()
    sequence = line.add(prompt("a", 10))
    row = step(line).prefills[0]
    assert isinstance(row.pages, array) and row.pages is sequence.pages


def test_the_work_of_admitting_a_prompt_grows_with_its_pages_not_with_its_tokens():
    def admitted(tokens):
        line = Scheduler(Limits(4, 8192, 4), [PagePool(200, 64, PrefixIndex(64))])
        request = prompt("a", tokens)

        def admit():
            line.add(request)
            line.schedule()

        return work(admit)

    assert 0 < admitted(64 * 101) - admitted(64) < 100 * 40


def turn(line):
    """A step after which somebody ends, so that somebody is admitted in the next."""
    batch = line.schedule()
    sequences = line.commit(batch)
    for row, sequence in zip(batch.rows, sequences, strict=True):
        if row.samples:
            line.append(sequence, 7)
    line.finish(sequences[0])


@pytest.mark.parametrize("policy", policies.names())
def test_a_step_costs_the_same_however_long_the_line_is(policy):
    costs = []
    for waiting in (100, 10_000):
        line = scheduler(pages=100, policy=policy, sequences=8)
        for number in range(waiting):
            line.add(Request(str(number), (number, *range(number % 20)), priority=number % 7), 9)
        for _ in range(20):
            turn(line)
        costs.append(work(lambda line=line: [turn(line) for _ in range(20)]))
    assert costs[1] <= 1.5 * costs[0]


def change_counts(line):
    line.pools[0]._owners[1] += 1


def lose_a_slot(line):
    line._slots[0].pop()


def compute_too_much(line):
    line._running[0].computed += 100


def draw_too_much(line):
    line._running[0].pending = 3


def wrong_order(line):
    line._running.reverse()


def share_what_is_written(line):
    one, two = line._running
    line.pools[0].release([two.pages[-1]])
    line.pools[0].share([one.pages[-1]])
    two.pages[-1] = one.pages[-1]


@pytest.mark.parametrize("fault", [change_counts, lose_a_slot, compute_too_much, draw_too_much, wrong_order, share_what_is_written])
def test_check_sees_broken_accounts(fault):
    line = scheduler()
    line.add(prompt("a", 3))
    line.add(prompt("b", 3))
    step(line)
    fault(line)
    with pytest.raises(RuntimeError):
        line.check()


# Drafts


def decoding(line, *names, limit=20):
    """Sequences whose prompt is computed and whose first token is known."""
    for name in names:
        line.add(prompt(name, 3), limit)
    step(line)
    return {name: line.find(name)[0] for name in names}


def test_a_decode_carries_drafts_and_what_does_not_stand_is_taken_back():
    line = scheduler()
    found = decoding(line, "a", "b")
    assert line.decoding == [found["a"], found["b"]]
    batch = line.schedule({("a", 0): (5, 6, 9), ("c", 0): (1,)})
    assert [row.tokens for row in batch.decodes] == [(LAST_SAMPLED, 5, 6, 9), (LAST_SAMPLED,)]
    assert found["a"].length == 8 and line.decoding == [found["b"]]
    line.check()
    assert [row.request.id for row in line.schedule().decodes] == ["b"]  # where "a" goes on is not known
    line.commit(batch, [3, 1])
    for token in (5, 6, 7):
        line.append(found["a"], token)
    line.append(found["b"], 7)
    line.check()
    assert (found["a"].computed, found["a"].length, found["a"].pending, found["a"].drafts) == (6, 7, 0, 0)
    assert [row.start for row in line.schedule().decodes if row.request.id == "a"] == [6]


def test_where_limits_allow_it_a_sequence_goes_on_before_its_drafts_are_known():
    line = scheduler(unsettled=True)
    sequence = decoding(line, "a")["a"]
    first = line.schedule({("a", 0): (5, 6, 9)})
    assert line.decoding == [sequence]
    second = line.schedule({("a", 0): (DRAFTED, DRAFTED)})
    assert [(row.start, row.tokens, row.unsettled) for row in first.decodes] == [(3, (LAST_SAMPLED, 5, 6, 9), False)]
    assert [(row.start, row.tokens, row.unsettled) for row in second.decodes] == [(7, (LAST_SAMPLED, DRAFTED, DRAFTED), True)]
    assert line.decoding == [] and line.schedule() is None  # the device knows what came of one step, not of two
    line.check()
    line.commit(first, [2])
    for token in (5, 7):
        line.append(sequence, token)
    assert (sequence.computed, sequence.pending, sequence.drafts) == (8, 3, 2)  # two of the first step's are taken back
    third = line.schedule()
    assert [(row.start, row.tokens, row.unsettled) for row in third.decodes] == [(8, (LAST_SAMPLED,), True)]
    line.commit(second, [3])
    for token in (1, 2, 3):
        line.append(sequence, token)
    line.commit(third, [1])
    line.append(sequence, 4)
    line.check()
    assert (sequence.computed, sequence.length, sequence.pending, sequence.drafts) == (9, 10, 0, 0)
    assert not line.schedule().decodes[0].unsettled


def test_drafts_end_with_the_limit_and_cost_nobody_a_page():
    line = scheduler(pages=4)
    decoding(line, "a", limit=3)
    assert line.schedule({("a", 0): (5, 6, 9)}).decodes[0].tokens == (LAST_SAMPLED, 5)
    line = scheduler(pages=2)
    decoding(line, "a")
    batch = line.schedule({("a", 0): (5, 6, 9)})
    assert [len(row.tokens) for row in batch.decodes] == [1] and not line.preemptions


def test_there_are_no_drafts_beside_prompts():
    line = scheduler()
    found = decoding(line, "a")
    line.add(prompt("b", 6))
    assert line.decoding == []
    batch = line.schedule({("a", 0): (5, 6)})
    assert ([row.tokens for row in batch.decodes], ids(batch.prefills)) == ([(LAST_SAMPLED,)], ["b"])
    done(line, batch)
    assert (found["a"].computed, found["a"].drafts) == (4, 0)


def test_pages_with_drafts_are_not_known_before_they_stand():
    line = scheduler()
    found = decoding(line, "a")
    batch = line.schedule({("a", 0): (5, 6, 9, 4, 3, 2)})
    assert len(found["a"].pages) * PAGE >= 10 and found["a"].chain.entered == 1
    line.commit(batch, [2])
    for token in (5, 8):
        line.append(found["a"], token)
    assert found["a"].chain.entered == 1 and found["a"].computed == 5
    line.check()
