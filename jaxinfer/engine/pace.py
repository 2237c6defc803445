"""What happened lately at one number of rows: whether drafts seem to pay, and which steps are due. Plain Python.

This file does not know what steps cost, or what drafts are worth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxinfer.engine.resting import LONGEST, SHORTEST

FIRST = 64  # steps with drafts before the first that are made without, to see what these cost
APART = 16  # steps without drafts between two trials, at least
FADING = 0.9  # of what is known of excursions, with each that ends
WIDE, RETURNS = 2.0, 1.0  # excursions are thought to be at first: steps with drafts, and plain ones that wait for them
OLD = 128  # plain steps after which what is known of excursions no longer counts
CURIOUS = 2  # asked in vain so often since the last rest, they are left alone until the next
PUT_OFF = 8  # times that nobody is asked behind prompts, where somebody could be, before somebody is
PATIENT = 4  # asked in vain so often in a row, proposers are asked as the allowance permits
READING = 32  # asked so often who has more to read, before drafts are believed in again, likewise: 16,384 tokens


@dataclass
class Excursions:
    """Steps with drafts (`wide`), and plain ones that waited for one (`returns`); these fade."""

    wide: float = WIDE
    returns: float = RETURNS

    def returned(self) -> None:
        """A plain step had to wait for one with drafts."""
        self.wide, self.returns = FADING * self.wide, FADING * self.returns + 1

    @property
    def waiting(self) -> float:
        """How often a plain step waits, for each step with drafts."""
        return self.returns / self.wide


@dataclass
class Pace:
    """What happened at one number of rows. drafting: drafts seem to pay. vain: how often in a row asking led to none, since the last rest;
    right: how often in a row what was said, and not used, has come true; reads: how often it led to reading on since drafts were last
    believed in; put_off: how often in a row nobody was asked who could have been. rest: steps of the next one, twice as many after each,
    few where drafts gain. age: steps with drafts since plain ones were far from them; looks: how many plain ones are still to come to see
    what these cost; bare: those far from drafts are to be made without the draft model; until: the age at which they are due. out: the
    draft model was left out of the last plain step; missed: no prompts came that it could have seen when the last rest ended; told: that
    one showed what plain steps take. apart: plain steps since the last one with drafts."""

    drafting: bool = True
    vain: int = 0
    right: int = 0
    reads: int = 0
    put_off: int = 0
    rest: int = SHORTEST
    age: int = 0
    looks: int = 0
    bare: bool = False
    until: int = FIRST
    out: bool = False
    missed: bool = False
    told: bool = False
    apart: int = APART
    excursions: Excursions = field(default_factory=Excursions)

    def asked(self, *, believed: bool) -> None:
        """Proposers were asked. believed: what they say is likely to pay."""
        self.vain, self.reads = (0, 0) if believed else (self.vain + 1, self.reads)
        self.told &= not believed  # from here on plain steps between those with drafts tell more
        self.drafting = believed or (self.drafting and self.vain < PATIENT)

    def compared(self, *, right: bool) -> None:
        """What was said is compared with what came. right: it has come true."""
        self.right = self.right + 1 if right else 0

    def reading(self) -> None:
        """Proposers were asked that have more to read first: that was not in vain, but does not go on for ever."""
        self.vain, self.reads = 0, self.reads + 1
        self.drafting &= self.reads < READING

    @property
    def prompts_after(self) -> int:
        """Behind how many steps of the next rest prompts end it, if there is a draft model that should see them."""
        return 0 if self.missed else self.rest

    @property
    def curious(self) -> bool:
        """Whether it is not yet time to leave it for a while. What was said is compared with what came when it is asked again."""
        return self.vain < CURIOUS or self.right >= CURIOUS

    @property
    def is_bare(self) -> bool:
        """Whether the next plain step shows what one takes far from drafts, without the draft model."""
        return self.bare and self.looks > 0 and self.apart >= APART

    def puts_off(self, *, behind: bool, may: bool) -> bool:
        """Whether nobody is asked who may be, because the step is behind prompts."""
        found = may and behind and self.put_off < PUT_OFF
        self.put_off = self.put_off + found if behind else 0
        return found

    def drafted(self) -> None:
        """A step with drafts was made."""
        self.age += 1
        self.apart = self.put_off = 0
        self.excursions.wide += 1

    def look(self, looks: int, most: int) -> None:
        """So many plain steps are due; the next are at twice the age, or at `most`."""
        self.looks, self.bare, self.until = looks, True, min(2 * self.until, most)

    def enter(self, looks: int) -> None:
        """The draft model keeps up again; so many plain steps are due that show what this takes."""
        self.looks, self.bare = looks, False

    def gained(self) -> None:
        """Drafts have brought more than they took."""
        self.rest = SHORTEST

    def plain(self, *, steady: bool) -> None:
        """One without was made; steady: behind another."""
        self._away(1)
        if steady:
            self.looks = max(0, self.looks - 1)

    def rested(self, steps: int, *, missed: bool = False, told: bool = False) -> None:
        """So many without were made, where nothing was due. missed: the draft model saw no prompts behind them; told: they were timed."""
        self._away(steps)
        self.missed, self.told = missed, told
        self.vain = self.right = 0
        self.rest = min(2 * self.rest, LONGEST)

    def _away(self, steps: int) -> None:
        before, self.apart = self.apart, self.apart + steps
        if self.apart > APART:
            self.age = 0
        if self.apart > 2 * APART:
            self.until = FIRST
        if self.apart // OLD > before // OLD:
            self.excursions = Excursions()
