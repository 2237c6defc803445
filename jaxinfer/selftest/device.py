"""A device without arithmetic: for every slot of every page it keeps which text the K and V there were computed from.

The content of a position is a *mark*: a number that stands for the salt and all tokens up to that position, so equal marks mean equal
beginnings. A batch is run as the compiled step runs it: pages are copied, sequences enter their slots, every row writes, then every row
reads; what a row finds in its pages must be exactly its own text, aside from drafts: those may be wrong. Also refused: a write to a page
that another row reads, in this batch or in one that is not committed. What the model draws is a function of the mark, so equal beginnings
go on equally. This file does not know how batches are chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Values
from dataclasses import dataclass
from zlib import crc32

from jaxinfer.batch import LAST_SAMPLED, Batch, PageCopy, Row
from jaxinfer.engine.sequence import Key, Sequence

VOCABULARY = 16
STOP = 0
RUINED = -1
MANY: Key = ("", -1)


class Broken(RuntimeError):
    """The scheduler did what it must not."""


@dataclass(eq=False, slots=True)
class Life:
    """A sequence as it truly is: every token, those only the device knows included, and their marks. `born`: admissions before it came."""

    sequence: Sequence
    tokens: list[int]
    marks: list[int]
    limit: int
    born: int = 0

    @classmethod
    def of(cls, sequence: Sequence, limit: int, born: int = 0) -> Life:
        """Before its first step."""
        life = cls(sequence, [], [], limit, born)
        for token in sequence.request.prompt:
            life.grow(token)
        return life

    def grow(self, token: int) -> None:
        """One more token."""
        before = self.marks[-1] if self.marks else crc32(self.sequence.request.cache_salt.encode())
        self.tokens.append(token)
        self.marks.append(_mark(before, token))

    def draw(self) -> int:
        """What the model says next; the sequences of one request differ in their seeds."""
        (token,) = self.foresee(1)
        self.grow(token)
        return token

    def foresee(self, count: int) -> list[int]:
        """What the model is going to say."""
        found, mark = [], self.marks[-1]
        for _ in range(count):
            found.append(hash((mark, self.sequence.request.index)) // 7 % VOCABULARY)
            mark = _mark(mark, found[-1])
        return found

    def marks_along(self, start: int, tokens: Values[int]) -> list[int]:
        """The marks of tokens that are written from a position on, right or wrong."""
        found = self.marks[:start][-1:] or [crc32(self.sequence.request.cache_salt.encode())]
        for token in tokens:
            found.append(_mark(found[-1], token))
        return found[1:]


def _mark(before: int, token: int) -> int:
    return hash((before, token)) & 0x7FFFFFFFFFFFFFFF


class Device:
    """Pages and slots of all replicas: for each page its marks, who wrote it last, and the mark before its first."""

    def __init__(self, replicas: int, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.memory = [[[RUINED] * page_size for _ in range(pages)] for _ in range(replicas)]
        self.writers: list[list[Key]] = [[MANY] * pages for _ in range(replicas)]
        self.before = [[RUINED] * pages for _ in range(replicas)]
        self.slots: dict[int, tuple[Key, int]] = {}
        self.rejected: dict[int, int] = {}
        self._reading: deque[dict[tuple[int, int], Key]] = deque()

    def run(self, batch: Batch, lives: list[Life]) -> list[tuple[int, ...]]:
        """Run a batch; `lives` are those of its rows.

        Returns:
            What each row draws: nothing, a token, or as many as its drafts allow.

        Raises:
            Broken: a row reads, writes or draws what it must not.
        """
        rows = [self._settled(row) for row in batch.rows]
        reading = self._readers(rows)
        for copy in batch.copies:
            self._copy(copy, reading)
        for admission in batch.admissions:
            self.slots[admission.slot] = admission.request.key, (admission.generated or admission.request.prompt)[-1]
        for row, life in zip(rows, lives, strict=True):
            self._write(row, life, reading)
        drawn = [self._read(row, life) for row, life in zip(rows, lives, strict=True)]
        if batch.decode_tokens > 1:
            self.rejected.update((row.slot, len(row.tokens) - len(tokens)) for row, tokens in zip(batch.decodes, drawn, strict=False))
        self._reading.append(reading)
        return drawn

    def commit(self) -> None:
        """The oldest batch is done."""
        self._reading.popleft()

    def ruin(self, replica: int, page: int) -> None:
        """What a page holds is not to be read any more."""
        self.memory[replica][page] = [RUINED] * self.page_size

    def _settled(self, row: Row) -> Row:
        """The row where it truly begins."""
        return row._replace(start=row.start - self.rejected[row.slot], unsettled=False) if row.unsettled else row

    def _readers(self, rows: Values[Row]) -> dict[tuple[int, int], Key]:
        reading: dict[tuple[int, int], Key] = {}
        for row in rows:
            key, replica = row.request.key, row.replica
            for page in row.pages[: -(-row.kv_length // self.page_size)]:
                place = (replica, page)
                reading[place] = MANY if place in reading else key
        return reading

    def _copy(self, copy: PageCopy, reading: dict[tuple[int, int], Key]) -> None:
        place = (copy.replica, copy.source)
        owner = self.writers[copy.replica][copy.source]
        if any((copy.replica, copy.target) in batch for batch in self._reading):
            raise Broken("a page is copied over while a launched step reads it")
        self.memory[copy.replica][copy.target] = list(self.memory[copy.replica][copy.source])
        reading.setdefault(place, owner)

    def _write(self, row: Row, life: Life, reading: dict[tuple[int, int], Key]) -> None:
        size, replica, key, end = self.page_size, row.replica, row.request.key, row.kv_length
        owner, last = self.slots[row.slot]
        if owner != key:
            raise Broken("a row names another sequence's slot")
        tokens = [last if token == LAST_SAMPLED else token for token in row.tokens]
        certain = len(life.tokens) - row.start
        if tokens[:certain] != life.tokens[row.start : end] or (certain < len(tokens) and (certain != 1 or not row.samples)):
            raise Broken("a row computes tokens that are not its sequence's")
        marks = life.marks_along(row.start, tokens)
        behind = [RUINED, *life.marks[: row.start], *marks]
        for number in range(row.start // size, (end - 1) // size + 1):
            page, first = row.pages[number], number * size
            place = (replica, page)
            if reading[place] != key and end < first + size:
                raise Broken("a row writes to a page that another row of the batch has")
            if any(batch.get(place, key) != key for batch in self._reading):
                raise Broken("a row writes to a page that a launched step of another sequence reads")
            low, high = max(first, row.start), min(first + size, end)
            self.memory[replica][page][low - first : high - first] = marks[low - row.start : high - row.start]
            self.writers[replica][page] = key
            self.before[replica][page] = behind[first]

    def _read(self, row: Row, life: Life) -> tuple[int, ...]:
        memory, length = self.memory[row.replica], min(row.kv_length, len(life.tokens))
        held = [mark for page in row.pages for mark in memory[page]]
        if held[:length] != life.marks[:length]:
            raise Broken("a row's pages hold something else than its text")
        if not row.samples:
            return ()
        if length != len(life.tokens):
            raise Broken("a token is drawn before all before it are computed")
        drawn = [life.draw()]
        for draft in row.tokens[length - row.start :]:
            if drawn[-1] != draft:
                break
            drawn.append(life.draw())
        if len(life.tokens) - len(row.request.prompt) > life.limit:
            raise Broken("a sequence draws more tokens than it may")
        self.slots[row.slot] = row.request.key, drawn[-1]
        return tuple(drawn)
