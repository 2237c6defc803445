"""The real scheduler, page pools and prefix index under arbitrary traffic, with a device that checks every row.

`Machine` plays users and engine: requests arrive and are aborted, batches are scheduled, launched and committed, with one batch on its
way while the next is scheduled (`overlap`) or none. After every action the scheduler's own `check` must hold, no row may read or write
what is not its own (`device.py`), the policy's order must be kept, and what can run must run. `drain` ends it all: everything finishes in a
bounded number of steps and nothing stays owned. `play` draws settings and traffic from a seed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, replace

from jaxinfer.batch import Batch
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import PrefixIndex, sha256
from jaxinfer.engine import policies
from jaxinfer.engine.line import PATIENCE
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Key, Limits
from jaxinfer.request import Request
from jaxinfer.selftest.device import STOP, VOCABULARY, Broken, Device, Life

PAGE_SIZE = 4
LONGEST = 40
LIVES = 24


@dataclass(frozen=True)
class Setting:
    """What a machine is made of. digest_bits: 0 switches the prefix index off, few force collisions. overlap: 0 or 1 batches ahead.
    drafts: at most so many of a sequence in a step."""

    pages: int = 24
    replicas: int = 1
    policy: str = "fcfs"
    overlap: int = 1
    digest_bits: int = 256
    limits: Limits = Limits(sequences=4, prefill_tokens=16, prefill_rows=2)
    drafts: int = 0

    @classmethod
    def drawn(cls, draw: random.Random) -> Setting:
        """Any setting."""
        replicas = draw.choice((1, 1, 1, 2))
        limits = Limits(draw.choice((2, 4, 6)), draw.choice((3, 16, 30)), draw.choice((1, 2, 4)), replicas)
        pages, policy = draw.choice((12, 12, 16, 24, 40)), draw.choice(policies.names())
        limits = replace(limits, unsettled=limits.sequences > 2)
        return cls(pages, replicas, policy, draw.randrange(2), draw.choice((0, 3, 6, 256, 256, 256)), limits, draw.choice((0, 2, 7)))


@dataclass(frozen=True)
class Arrival:
    """One call: `prefix` tokens of text number `text`, then `tail`; how many sequences, tokens, how urgent, which salt.

    Texts 0 to 2 are always the same, the next ones are the conversations that ended last, what was generated included.
    """

    text: int
    prefix: int
    tail: tuple[int, ...] = ()
    choices: int = 1
    limit: int = 8
    priority: int = 0
    salt: str = ""


class Machine:
    """A scheduler with its users, engine and device. `counts` says what happened."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        pools = [PagePool(setting.pages, PAGE_SIZE, _index(setting.digest_bits)) for _ in range(setting.replicas)]
        self.scheduler = Scheduler(setting.limits, pools, setting.policy)
        self.device = Device(setting.replicas, setting.pages, PAGE_SIZE)
        self.lives: dict[Key, Life] = {}
        self.counts: Counter[str] = Counter()
        self._texts = list(tuple(random.Random(text).choices(range(1, VOCABULARY), k=LONGEST)) for text in range(6))
        self._launched: deque[tuple[Batch, list[tuple[int, ...]]]] = deque()
        self._guesses = random.Random(setting.drafts)

    def arrive(self, arrival: Arrival) -> None:
        """A call comes in."""
        text = self._texts[arrival.text % len(self._texts)]
        prompt = (*text[: arrival.prefix], *arrival.tail)[: LONGEST - 1] or (1,)
        limit = min(arrival.limit, LONGEST - len(prompt))
        name = str(self.counts["calls"])
        self.counts["calls"] += 1
        for index in range(arrival.choices):
            request = Request(name, prompt, index=index, priority=arrival.priority, cache_salt=arrival.salt)
            self.lives[request.key] = Life.of(self.scheduler.add(request, limit), limit, self.counts["admitted"])
        self.counts["arrived"] += arrival.choices
        self.scheduler.check()

    def abort(self, number: int) -> None:
        """A caller leaves: all sequences of one call end."""
        if self.lives:
            name = list(self.lives)[number % len(self.lives)][0]
            for sequence in self.scheduler.find(name):
                self._end(sequence.request.key, "aborted")
            self.scheduler.check()

    def leave(self, number: int) -> None:
        """One sequence of a call ends, the others go on."""
        if self.lives:
            self._end(list(self.lives)[number % len(self.lives)], "left")
            self.scheduler.check()

    def poison(self, number: int) -> None:
        """A row has numbers that are not finite: it ends, those that share its pages as well, and nobody reads what they wrote."""
        running = [key for key, life in self.lives.items() if life.sequence.running]
        if not running:
            return
        key = running[number % len(running)]
        ruined = self._ruined(key)
        ill = [name for name in running if name == key or ruined & self._held(name)]
        for name in ill:
            sequence = self.lives[name].sequence
            wiped = {(sequence.replica, page) for page in self.scheduler.poison(sequence)}
            if any(wiped & self._held(other) for other in self.lives if other != name):
                raise Broken("a page is wiped that another sequence has")
            ruined |= wiped
            self._end(name, "poisoned")
        for replica, page in ruined:
            self.device.ruin(replica, page)
        self.scheduler.check()

    def step(self) -> None:
        """What an engine's step does: schedule and launch a batch, then commit until no more than `overlap` are on their way.

        Raises:
            Broken: nothing runs though something could, or somebody is passed over.
        """
        before = {key: life.sequence.running for key, life in self.lives.items()}
        batch = self.scheduler.schedule(self._drafts())
        if batch is None:
            if self.lives and not self._launched:
                raise Broken("there is work, but nothing runs")
        else:
            self._launch(batch, before)
        while len(self._launched) > (self.setting.overlap if batch is not None else 0):
            self._commit()
        self.scheduler.check()

    def drain(self) -> None:
        """No more arrivals: all that is here ends, and nothing stays owned.

        Raises:
            Broken: it does not.
        """
        for _ in range(60 * len(self.lives) + 4):
            self.step()
        if self.lives or self.scheduler.running or self.scheduler.waiting or self.scheduler.uncommitted:
            raise Broken("a sequence does not come to its end")
        if self.scheduler.usage or self.counts["arrived"] != sum(self.counts[how] for how in ("done", "aborted", "left", "poisoned")):
            raise Broken("all have ended, but something is owned or missing")

    def _drafts(self) -> dict[Key, tuple[int, ...]]:
        """Guesses of what comes next, some of them right to the end, some up to a point; for more sequences than may have any."""
        found: dict[Key, tuple[int, ...]] = {}
        for key, life in self.lives.items() if self.setting.drafts else ():
            count = self._guesses.randint(0, self.setting.drafts)
            right = self._guesses.choice((0, 1, count, count))
            found[key] = tuple(life.foresee(right)[:count]) + tuple(self._guesses.randrange(VOCABULARY) for _ in range(count - right))
        return found

    def _launch(self, batch: Batch, before: dict[Key, bool]) -> None:
        keys = [row.request.key for row in batch.rows]
        if len(set(keys)) != len(keys) or any(key not in self.lives for key in keys):
            raise Broken("two rows of one sequence, or a row of one that has ended")
        self._check_limits(batch)
        if batch.admissions:
            self._check_order(batch, before)
        if not self.setting.overlap:
            self._check_progress(set(keys))
        drawn = self.device.run(batch, [self.lives[key] for key in keys])
        self._launched.append((batch, drawn))
        self.counts.update(rows=len(keys), copies=len(batch.copies), admitted=len(batch.admissions))

    def _commit(self) -> None:
        batch, drawn = self._launched.popleft()
        self.device.commit()
        for row, sequence, tokens in zip(batch.rows, self.scheduler.commit(batch, list(map(len, drawn))), drawn, strict=True):
            self.counts.update(drafts=len(row.tokens[1:]) if row in batch.decodes else 0, stood=len(tokens[1:]))
            life = self.lives.get(row.request.key)
            if (sequence is None) != (life is None) or (life is not None and life.sequence is not sequence):
                raise Broken("a committed row is given to the wrong sequence")
            if life is not None:
                self._append(life, tokens)

    def _append(self, life: Life, tokens: tuple[int, ...]) -> None:
        """A sequence gets what a step drew, up to where it ends."""
        sequence = life.sequence
        for token in tokens:
            self.scheduler.append(sequence, token)
            if list(sequence.tokens) != life.tokens[: len(sequence.tokens)]:
                raise Broken("a sequence's tokens are not those that were drawn")
            if token == STOP or len(sequence.output) >= life.limit:
                self._end(sequence.request.key, "done")
                return

    def _end(self, key: Key, how: str) -> None:
        life = self.lives.pop(key)
        self.scheduler.finish(life.sequence)
        self._texts[3 + self.counts["ended"] % 3] = tuple(life.tokens)
        self.counts["ended"] += 1
        self.counts[how] += 1

    def _check_limits(self, batch: Batch) -> None:
        limits = self.setting.limits
        for replica in range(limits.replicas):
            decodes = [row for row in batch.decodes if row.replica == replica]
            prefills = [row for row in batch.prefills if row.replica == replica]
            tokens = sum(len(row.tokens) for row in prefills)
            if batch.decode_tokens > 1 + (0 if batch.prefills else self.setting.drafts):
                raise Broken("a row has more drafts than it may")
            if len(prefills) > limits.prefill_rows or tokens > limits.prefill_tokens or len(decodes) + len(prefills) > limits.sequences:
                raise Broken("a batch exceeds its limits")
            if any(row.slot // limits.sequences != replica for row in (*decodes, *prefills)):
                raise Broken("a slot of another replica")

    def _check_order(self, batch: Batch, before: dict[Key, bool]) -> None:
        """Nobody is admitted past one that waited already and stands before it; who waits longest may go first at any time."""
        if self.setting.policy == "longest_prefix":
            return
        waited = [life for key, life in self.lives.items() if not before[key] and not life.sequence.running and self._single(life)]
        if not waited:
            return
        first = min(map(self._rank, waited))
        for admission in batch.admissions:
            life = self.lives[admission.request.key]
            waited_long = self.counts["admitted"] + len(batch.admissions) - life.born >= PATIENCE
            if self._single(life) and not before[admission.request.key] and self._rank(life) > first and not waited_long:
                raise Broken("a sequence is admitted past one that stands before it")

    def _single(self, life: Life) -> bool:
        return len(self.scheduler.find(life.sequence.request.id)) == 1

    def _rank(self, life: Life) -> tuple[float, bool, int]:
        sequence = life.sequence
        key = {
            "fcfs": 0.0, "priority": sequence.request.priority,
            "shortest": float("-inf") if sequence.preemptions else len(sequence.request.prompt),
        }[self.setting.policy]  # fmt: skip
        return key, not sequence.preemptions, sequence.arrival

    def _check_progress(self, keys: set[Key]) -> None:
        """The running sequence of highest standing moves in every step, in each replica."""
        best: dict[int, Life] = {}
        for life in self.lives.values():
            sequence = life.sequence
            if sequence.running and (sequence.replica not in best or sequence.standing < best[sequence.replica].sequence.standing):
                best[sequence.replica] = life
        if any(life.sequence.request.key not in keys for life in best.values()):
            raise Broken("the sequence of highest standing does not move")

    def _held(self, key: Key) -> set[tuple[int, int]]:
        sequence = self.lives[key].sequence
        return {(sequence.replica, page) for page in sequence.pages}

    def _ruined(self, key: Key) -> set[tuple[int, int]]:
        """Pages with what a sequence wrote that it holds or that can be found, and those that can be found behind them."""
        device, held = self.device, set[tuple[int, int]]().union(*map(self._held, self.lives))
        known = {(r, page) for r, pool in enumerate(self.scheduler.pools) if pool.index is not None for page in pool.index.pages()}
        found = {place for place in known | self._held(key) if device.writers[place[0]][place[1]] == key}
        ends = {(r, device.memory[r][page][-1]) for r, page in found & known}
        while behind := {(r, page) for r, page in known - held - found if (r, device.before[r][page]) in ends}:
            found |= behind
            ends |= {(r, device.memory[r][page][-1]) for r, page in behind}
        return found


def play(seed: int, steps: int, setting: Setting | None = None) -> Counter[str]:
    """Draw a setting (unless one is given) and traffic from a seed, run so many actions, drain.

    Returns:
        How often what happened.

    Raises:
        RuntimeError: an invariant does not hold; ValueError, KeyError, IndexError: accounts went wrong.
    """
    draw = random.Random(seed)
    machine = Machine(setting or Setting.drawn(draw))
    rate = draw.choice((0.05, 0.15, 0.4))
    for _ in range(steps):
        chance = draw.random() if machine.lives else 0.0
        if chance < rate:
            if len(machine.lives) < LIVES:
                machine.arrive(_arrival(draw))
        elif chance < rate + 0.02:
            draw.choice((machine.abort, machine.leave))(draw.randrange(1000))
        elif chance < rate + 0.024:
            machine.poison(draw.randrange(1000))
        else:
            machine.step()
    machine.drain()
    return machine.counts + Counter(preemptions=machine.scheduler.preemptions, reused=machine.scheduler.reused)


def _arrival(draw: random.Random) -> Arrival:
    tail = tuple(draw.randrange(VOCABULARY) for _ in range(draw.choice((0, 1, 2, 5))))
    limit = draw.choice((1, 3, 16, LONGEST))
    choices, salt = draw.choice((1, 1, 1, 1, 2, 3)), draw.choice(("", "", "", "a"))
    return Arrival(draw.randrange(6), draw.choice((0, 3, 4, 8, 11, 16, 30, 30)), tail, choices, limit, draw.randint(0, 2), salt)


def _index(bits: int) -> PrefixIndex | None:
    if bits == 0:
        return None
    return PrefixIndex(PAGE_SIZE, digest=sha256 if bits == 256 else lambda data: bytes((sha256(data)[0] % (1 << bits),)))
