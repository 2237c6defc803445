"""What a step with drafts costs beside one without, for each number of rows: measured when the engine starts (`timing.py`), corrected by
what steps take. Plain Python.

Steps are compared with plain ones of the same size that lie far from drafts, or that a rest timed: close behind drafts plain steps may take
longer (on a GPU nothing lies where it lay, and what is launched behind another kind of step is launched anew), and beside those drafts
would seem to pay that made them slow. Until plain steps are far again, those with drafts tell whether the machine has become slower or
faster meanwhile. Means count on both sides: a way that takes long now and then is dear, which medians would hide; but no step counts for
more than `HELD_UP` of its kind, for then something else had the processor. Seconds are those of a monotonic clock. This file does not know
what drafts are worth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from jaxinfer.batch import Batch
from jaxinfer.engine.resting import Span
from jaxinfer.step.buckets import Bucket

PLAINS = 6  # plain steps far from drafts that others are compared with, the latest: no more than one look brings
KNOWN = PLAINS  # so many tell what one takes
KEPT = 15  # comparisons that are remembered
START = 6  # so many make what was measured at the start, which counts for two, forgotten: it had nothing to do
HELD_UP = 2.5  # times what is usual: what takes longer says nothing about its kind
OLD = 128  # steps after which comparisons no longer count: where they were unlucky, nothing would ever show it
TURNS = 5  # steps with drafts that tell what these took when plain ones were far from them last, and as many what they take now
RECENT = 16  # a plain step that lies further back says nothing of what a draft model takes that keeps up


class Way(NamedTuple):
    """How a step is run. width: tokens of a decode row. hidden: some of them are thought of on the device, by the draft model; of a plain
    step: the draft model sees its tokens. waits: it is launched when no other is on its way: host and devices wait for each other."""

    width: int
    hidden: bool = False
    waits: bool = False

    def __str__(self) -> str:
        if self.width == 1:
            return f"plain{' followed' if self.hidden else ''}{' alone' if self.waits else ''}"
        return f"{'model' if self.hidden else 'host'} x{self.width}"


PLAIN, FOLLOWED, ALONE = Way(1), Way(1, hidden=True), Way(1, waits=True)


class Seen(NamedTuple):
    """A step that was made. seconds: from the end of the one before, 0 where nothing was running then. drawn: tokens. steady: it was
    launched behind another, as all are where there are no drafts. followed: the draft model saw its tokens. alike: the host launched
    another such step meanwhile and did nothing else, or never does anything meanwhile."""

    batch: Batch
    bucket: Bucket
    seconds: float
    drawn: int
    steady: bool = True
    followed: bool = False
    alike: bool = True

    @property
    def rows(self) -> int:
        """Sequences in it."""
        return len(self.batch.rows)

    @property
    def way(self) -> Way:
        """How it was run."""
        return way_of(self.batch, self.bucket, followed=self.followed)


class Costs:
    """Steps by way and rows (per replica). Empty until something was measured."""

    def __init__(self) -> None:
        self.ways: list[Way] = []  # to run a step with drafts that were measured, the narrowest first
        self._start: dict[tuple[Way, int], float] = {}
        self._measured_ways: set[Way] = set()
        self._plains: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}
        self._begun: dict[int, dict[Way, list[float]]] = {}  # what steps with drafts took, behind others, since plain ones were far
        self._turns: dict[int, deque[float]] = {}  # and how many times as long they took, the latest
        self._latest: dict[int, int] = {}  # when a plain step was seen last
        self._ratios: dict[tuple[Way, int], deque[float]] = {}
        self._typical: dict[tuple[Way, int], float] = {}
        self._compared: dict[tuple[Way, int], int] = {}
        self._sizes: dict[tuple[Way, int], int] = {}
        self._seen: set[tuple[Way, int]] = set()
        self._steps = 0

    def set(self, way: Way, rows: int, seconds: float) -> None:
        """Note what the program for so many rows took at the start."""
        self._start[way, rows] = seconds
        self._measured_ways.add(way)
        self.ways = sorted(known for known in self._measured_ways if known.width > 1)
        self._sizes.clear()

    def take(self, way: Way, rows: int, seconds: float, *, far: bool = False) -> float:
        """Note what a step of so many rows took. far: no drafts are near.

        Returns what is to be charged for it: the first of its kind touches everything for the first time, so it says nothing and counts
        for no more than was measured at the start.

        Raises:
            LookupError: no such step was measured.
        """
        size = self.size(PLAIN, rows)
        self._steps += 1
        if (way, size) not in self._seen:
            self._seen.add((way, size))
            return min(seconds, self.ratio(way, size) * self.seconds(size))
        if way.width > 1 and seconds > 0 and not far:
            self._turn(way, size, seconds)
        elif way in (PLAIN, FOLLOWED) and not far and self.known(size):
            return seconds
        if way == FOLLOWED and self._steps - self._latest.get(size, -RECENT) > RECENT:
            self._add(size, seconds / self.ratio(FOLLOWED, size))
        elif way == PLAIN:
            self._latest[size] = self._steps
            self._add(size, seconds)
        else:
            self._compare(way, size, seconds)
        return seconds

    def rested(self, size: int, seconds: float) -> None:
        """Note what plain steps of a size took where no drafts were near: no others count beside them."""
        self._latest[size] = self._steps
        self._plains.pop(size, None)
        for _ in range(PLAINS):
            self._add(size, seconds)

    def table(self) -> dict[tuple[Way, int], float]:
        """What each program took at the start, in seconds."""
        return dict(self._start)

    def ratio(self, way: Way, rows: int) -> float:
        """How many plain steps a step of so many rows takes.

        Raises:
            LookupError: no program measured holds them.
        """
        size = self.size(PLAIN, rows)
        found = self._typical.get((way, size))
        if found is None or self._old(way, size):
            found = self._typical[way, size] = self._measured(way, size)
        return found

    def more(self, way: Way, rows: int) -> float:
        """How many plain steps more a plain step takes that is run so; 0 if that was never measured."""
        return max(0.0, self.ratio(way, rows) - 1) if way in self._measured_ways else 0.0

    def seconds(self, rows: int) -> float:
        """What a plain step of so many rows takes at present.

        Raises:
            LookupError: no program measured holds them.
        """
        size = self.size(PLAIN, rows)
        found = self._usual.get(size)
        if found is not None:
            return found
        if not self._plains.get(size):
            return self._start[PLAIN, size]
        found = self._usual[size] = _mean(self._plains[size]) * self.turned(size)
        return found

    def turned(self, rows: int) -> float:
        """How many times as long steps with drafts take as when plain ones were far from them last; 1 if few were made since."""
        turns = self._turns.get(self.size(PLAIN, rows), ())
        return _median(turns) if len(turns) == TURNS else 1.0

    def known(self, rows: int) -> bool:
        """Whether enough plain steps were made to say what one takes."""
        return len(self._plains.get(self.size(PLAIN, rows), ())) >= KNOWN

    def span(self, rows: int, replicas: int) -> Span:
        """All numbers of rows, those of all replicas together, that the plain program for so many in each runs."""
        most = self.size(PLAIN, rows)
        less = max((size for way, size in self._start if way == PLAIN and size < most), default=0)
        return Span(less * replicas + 1, most * replicas)

    def size(self, way: Way, rows: int) -> int:
        """The rows of the program that holds so many.

        Raises:
            LookupError: none that was measured does.
        """
        found = self._sizes.get((way, rows))
        if found is None:
            sizes = [size for known, size in self._start if known == way and size >= rows]
            if not sizes:
                raise LookupError(f"no {way} step of {rows} rows was measured")
            found = self._sizes[way, rows] = min(sizes)
        return found

    def _compare(self, way: Way, size: int, seconds: float) -> None:
        """Hold a step beside the plain ones of its size."""
        if self._old(way, size):
            self._ratios.pop((way, size), None)
        self._compared[way, size] = self._steps
        ratios = self._ratios.setdefault((way, size), deque(maxlen=KEPT))
        ratios.append(seconds / self.seconds(size))
        found = _mean(ratios if len(ratios) > START else [*ratios, *(self._measured(way, size),) * 2])
        self._typical[way, size] = max(found, 1.0)  # more work takes no less

    def _turn(self, way: Way, size: int, seconds: float) -> None:
        """Note how many times as long a step with drafts took as the first that were made since plain ones were far from them."""
        begun = self._begun.setdefault(size, {}).setdefault(way, [])
        if len(begun) < TURNS:
            begun.append(seconds)
        if len(begun) == TURNS:
            self._turns.setdefault(size, deque(maxlen=TURNS)).append(seconds / _median(begun))
            self._usual.pop(size, None)

    def _add(self, size: int, seconds: float) -> None:
        """Note a plain step far from drafts; what one usually takes is worked out when somebody asks, which is seldom where drafts do not
        pay."""
        self._plains.setdefault(size, deque(maxlen=PLAINS)).append(seconds)
        for known in (self._usual, self._begun, self._turns):
            known.pop(size, None)

    def _old(self, way: Way, size: int) -> bool:
        """Whether comparisons no longer count. Those of steps that a draft model has seen do: others are seldom made beside them."""
        return way != FOLLOWED and self._steps - self._compared.get((way, size), self._steps) > OLD

    def _measured(self, way: Way, size: int) -> float:
        return max(1.0, self._start[way, self.size(way, size)] / self._start[PLAIN, size])


def way_of(batch: Batch, bucket: Bucket, *, followed: bool) -> Way:
    """How a step without prompts is run. followed: the draft model sees its tokens."""
    return Way(bucket.decode_tokens, batch.hidden if bucket.decode_tokens > 1 else followed)


def _mean(values: Sequence[float]) -> float:
    """Of what is usual: no more than `HELD_UP` times that of each."""
    most = HELD_UP * _median(values)
    return fmean([min(each, most) for each in values])


def _median(values: Iterable[float]) -> float:
    """The one in the middle, of two the lower."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
