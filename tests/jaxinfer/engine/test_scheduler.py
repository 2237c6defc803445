"""The real scheduler and page pools under random traffic, with a device that remembers what every page and slot holds.

`Walk` plays engine, device and users: it adds, aborts and finishes requests at random in pools so small that sequences are preempted
all the time. After every step pages, slots, budgets and order are checked, and each row's pages must hold exactly its own tokens.
"""

import random

import pytest

from jaxinfer.batch import LAST_SAMPLED, Row
from jaxinfer.cache.pages import PagePool
from jaxinfer.engine.scheduler import Limits, Scheduler, Sequence
from jaxinfer.request import Request
from jaxinfer.step.buckets import buckets, choose, occupancy

PAGE, LONGEST, LIMITS = 4, 40, Limits(sequences=4, prefill_tokens=16, prefill_rows=2)


def sampled(key, position):
    """The token that the model would draw there, whatever the schedule was."""
    return 1000 + hash((key, position)) % 1000


class Device:
    """What stays on the device: in each replica's pages who wrote which token at which position, in each slot its owner and last token."""

    def __init__(self, replicas, pages):
        self.pages = [[[None] * PAGE for _ in range(pages)] for _ in range(replicas)]
        self.slots = {}

    def admit(self, admission):
        tokens = (*admission.request.prompt, *admission.generated)
        self.slots[admission.slot] = [admission.request.key, tokens[-1]]

    def run(self, row: Row, history):
        """Compute a row; what its pages hold must be its own tokens. Returns the drawn token, None for a row that draws none."""
        owner, last = self.slots[row.slot]
        assert owner == row.request.key, "a row names another sequence's slot"
        for position, token in enumerate(row.tokens, row.start):
            token = last if token == LAST_SAMPLED else token
            assert token == history[position], "a row computes a token that is not its own"
            self.pages[row.replica][row.pages[position // PAGE]][position % PAGE] = (owner, position, token)
        held = [slot for page in row.pages for slot in self.pages[row.replica][page]][: row.kv_length]
        assert held == [(owner, position, history[position]) for position in range(row.kv_length)], "pages hold something else"
        if not row.samples:
            return None
        assert row.kv_length == len(history)
        self.slots[row.slot][1] = sampled(owner, row.kv_length)
        return self.slots[row.slot][1]


class Walk:
    """A scheduler with its users; `step` is one step of an engine, `drain` ends it all."""

    def __init__(self, seed=0, *, replicas=1, pages=14, policy="fcfs", patience=0.0):
        self.draw = random.Random(f"{seed} {replicas} {policy}")
        self.limits = Limits(LIMITS.sequences, LIMITS.prefill_tokens, LIMITS.prefill_rows, replicas)
        self.scheduler = Scheduler(self.limits, [PagePool(pages, PAGE) for _ in range(replicas)], policy)
        self.device = Device(replicas, pages)
        self.buckets = buckets(self.limits.sequences, self.limits.prefill_tokens)
        self.patience = patience
        self.live: dict[tuple[str, int], tuple[Sequence, int]] = {}
        self.next: dict[tuple[str, int], int] = {}
        self.first_admissions: list[int] = []
        self.added = self.done = self.aborted = 0

    def add(self):
        length = self.draw.randint(1, LONGEST - 1) if self.draw.random() < 0.3 else self.draw.randint(1, 12)
        prompt = tuple(self.draw.randrange(1000) for _ in range(length))
        request = Request(str(self.added), prompt, priority=self.draw.randint(0, 2))
        self.live[request.key] = self.scheduler.add(request), self.draw.randint(1, LONGEST - length)
        self.added += 1

    def abort(self):
        key = self.draw.choice(list(self.live))
        for sequence in self.scheduler.find(key[0]):
            self.scheduler.finish(sequence)
        del self.live[key]
        self.aborted += 1

    def traffic(self):
        if self.draw.random() < 0.25 and len(self.live) < 30:
            for _ in range(self.draw.choice((1, 1, 1, 6))):
                self.add()
        if self.live and self.draw.random() < 0.02:
            self.abort()

    def step(self):
        batch = self.scheduler.schedule()
        self.scheduler.check()
        assert (batch is None) == (not self.live), "an engine with work must not be idle"
        if batch is None:
            return
        self.check(batch)
        for admission in batch.admissions:
            if not admission.generated and admission.request.key not in self.next:
                self.first_admissions.append(int(admission.request.id))
            self.next[admission.request.key] = 0
            self.device.admit(admission)
        for row in batch.rows:
            self.advance(row)
        self.scheduler.check()

    def check(self, batch):
        replicas = range(self.limits.replicas)
        heads = [next((key for key, s in self.scheduler._running.items() if s.replica == r), None) for r in replicas]
        keys = [row.request.key for row in batch.rows]
        assert len(set(keys)) == len(keys), "two rows of one sequence"
        assert all(head is None or head in keys for head in heads), "the oldest sequence of a replica does not move"
        assert all(len(row.tokens) == 1 for row in batch.decodes)
        assert all(row.slot // self.limits.sequences == row.replica for row in batch.rows), "a slot of another replica"
        for r in replicas:
            prefills = [row for row in batch.prefills if row.replica == r]
            assert len(prefills) <= self.limits.prefill_rows
            assert sum(len(row.tokens) for row in prefills) <= self.limits.prefill_tokens
        choose(self.buckets, occupancy(batch, self.limits.replicas))
        running = [key for key, sequence in self.scheduler._running.items() if sequence.missing <= 1]
        assert set(self.live) == {s.request.key for key in self.live for s in self.scheduler.find(key[0])}
        assert set(running) >= {row.request.key for row in batch.decodes}

    def advance(self, row):
        key = row.request.key
        sequence, limit = self.live[key]
        assert row.start == self.next[key], "positions must follow each other, each once in a tenure"
        self.next[key] += len(row.tokens)
        token = self.device.run(row, sequence.tokens)
        if token is None:
            return
        assert self.scheduler.sequence(row) is sequence
        self.scheduler.append(sequence, token)
        if len(sequence.output) >= limit or self.draw.random() < 0.02:
            expected = [sampled(key, len(row.request.prompt) + i) for i in range(len(sequence.output))]
            assert sequence.output == expected
            self.scheduler.finish(sequence)
            del self.live[key], self.next[key]
            self.done += 1

    def run(self, steps):
        for _ in range(steps):
            self.traffic()
            self.step()
        return self

    def drain(self):
        """No more traffic: everything ends, in no more steps than there are tokens (each recomputed at most once per preemption)."""
        for _ in range(60 * len(self.live) + 1):
            self.step()
        assert not self.live
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert self.scheduler.usage == 0.0
        assert all(pool.owned == 0 for pool in self.scheduler.pools)
        assert self.done + self.aborted == self.added
        self.scheduler.check()
        return self


@pytest.mark.parametrize(("replicas", "policy"), [(1, "fcfs"), (1, "priority"), (1, "shortest"), (2, "fcfs"), (3, "shortest")])
def test_random_traffic(replicas, policy):
    walk = Walk(replicas=replicas, policy=policy).run(4000).drain()
    assert walk.scheduler.preemptions > 200
    assert walk.aborted > 30
    assert walk.done > 300


def test_first_come_first_served_admits_in_order_of_arrival():
    walk = Walk(seed=1).run(1500).drain()
    assert walk.first_admissions == sorted(walk.first_admissions)


def test_an_idle_scheduler_has_nothing_to_do():
    walk = Walk()
    assert walk.scheduler.schedule() is None
    walk.add()
    walk.abort()
    assert walk.scheduler.schedule() is None


def scheduler(pages=14, **changes):
    limits = Limits(**{"sequences": 4, "prefill_tokens": 16, "prefill_rows": 2, **changes})
    return Scheduler(limits, [PagePool(pages, PAGE) for _ in range(limits.replicas)])


def prompt(name, length, index=0):
    return Request(name, tuple(range(length)), index=index)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    line = scheduler()
    short = line.add(prompt("short", 3))
    first = line.schedule()
    assert [row.samples for row in first.prefills] == [True]
    line.append(short, 7)
    line.add(prompt("long", 35))
    chunks = []
    for _ in range(3):
        batch = line.schedule()
        assert [row.request.id for row in batch.decodes] == ["short"]
        line.append(short, 7)
        chunks += [(row.start, len(row.tokens), row.samples) for row in batch.prefills]
    assert chunks == [(0, 16, False), (16, 16, False), (32, 3, True)]


def test_the_last_token_of_a_prompt_alone_is_a_decode():
    line = scheduler(prefill_tokens=4)
    line.add(prompt("a", 5))
    assert [row.tokens for row in line.schedule().prefills] == [(0, 1, 2, 3)]
    batch = line.schedule()
    assert [(row.start, row.tokens, row.samples) for row in batch.decodes] == [(4, (LAST_SAMPLED,), True)]
    assert batch.prefills == ()


def test_the_sequence_admitted_last_is_preempted_and_comes_back_first():
    line = scheduler(pages=5)
    old, new = line.add(prompt("old", 8)), line.add(prompt("new", 7))
    assert len(line.schedule().prefills) == 2
    line.append(old, 100)
    line.append(new, 200)
    late = line.add(prompt("late", 1))
    batch = line.schedule()
    assert [row.request.id for row in batch.rows] == ["old"]
    assert (new.slot, new.pages, new.computed, new.tokens[-1]) == (-1, [], 0, 200)
    assert line.preemptions == 1
    assert line.waiting == 2
    line.finish(old)
    batch = line.schedule()
    assert [(a.request.id, a.generated) for a in batch.admissions] == [("new", (200,)), ("late", ())]
    assert [row.tokens for row in batch.prefills] == [(0, 1, 2, 3, 4, 5, 6, 200), (0,)]
    line.finish(new)
    line.finish(late)
    assert line.usage == 0.0


def test_the_preempted_come_back_in_their_order():
    line = scheduler(pages=8, prefill_tokens=64, prefill_rows=4)
    sequences = [line.add(prompt(name, length)) for name, length in (("a", 8), ("b", 8), ("c", 8), ("d", 4))]
    line.schedule()
    for sequence in sequences:
        line.append(sequence, 7)
    assert [row.request.id for row in line.schedule().rows] == ["a", "b"]
    assert line.preemptions == 2
    line.add(prompt("late", 1))
    for sequence in sequences[:2]:
        line.finish(sequence)
    assert [admission.request.id for admission in line.schedule().admissions] == ["c", "d", "late"]


def test_nobody_overtakes_the_one_that_does_not_fit():
    line = scheduler(pages=6)
    running = line.add(prompt("a", 12))
    line.schedule()
    line.append(running, 7)
    line.add(prompt("big", 12))
    line.add(prompt("small", 1))
    assert line.schedule().admissions == ()
    assert line.waiting == 2


def test_replicas_fill_evenly():
    line = scheduler(replicas=2, prefill_rows=4)
    line.add(prompt("large", 12))
    line.schedule()
    for name in "abcd":
        line.add(prompt(name, 4))
    batch = line.schedule()
    assert [row.replica for row in batch.prefills] == [1, 1, 1, 0]
    assert [row.slot for row in batch.prefills] == [4, 5, 6, 1]


def test_find_gives_every_choice_of_a_request_wherever_it_is():
    line = scheduler()
    for index in range(6):
        line.add(prompt("many", 4, index))
    line.add(prompt("other", 4))
    line.schedule()
    assert (line.running, line.waiting) == (2, 5)
    assert sorted(sequence.request.index for sequence in line.find("many")) == list(range(6))
    assert line.find("nobody") == []


def plant(monkeypatch, name, make):
    original = getattr(Scheduler, name)
    monkeypatch.setattr(Scheduler, name, make(original))


def leak_a_page(original):
    def finish(self, sequence):
        sequence.pages = sequence.pages[1:]
        original(self, sequence)

    return finish


def keep_the_slot(original):
    def give_back(self, sequence):
        slot, sequence.slot = sequence.slot, -1
        original(self, sequence)
        self._slots[sequence.replica].extend([slot] if slot > 0 else [])

    return give_back


def forget_to_recompute(original):
    def preempt(self, sequence):
        computed = sequence.computed
        original(self, sequence)
        sequence.computed = min(computed, PAGE)

    return preempt


def oldest_is_the_victim(original):
    def preempt(self, sequence):
        first = next(s for s in self._running.values() if s.replica == sequence.replica)
        original(self, first)

    return preempt


def page_too_late(original):
    def decode(self, sequence):
        token = sequence.tokens.pop()
        rows = list(original(self, sequence))
        sequence.tokens.append(token)
        return iter(rows)

    return decode


def skip_a_token(original):
    def row(self, sequence, tokens):
        made = original(self, sequence, tokens)
        sequence.computed += sequence.missing > 3
        return made

    return row


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("finish", leak_a_page), ("_give_back", keep_the_slot), ("_preempt", forget_to_recompute), ("_preempt", oldest_is_the_victim),
        ("_decode", page_too_late), ("_row", skip_a_token),
    ],
)  # fmt: skip
def test_the_walk_sees_planted_faults(monkeypatch, name, fault):
    plant(monkeypatch, name, fault)
    with pytest.raises((AssertionError, RuntimeError, ValueError, KeyError, IndexError)):
        Walk(seed=3).run(1000).drain()
