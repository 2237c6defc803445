"""The next best step: single changes to a plan, weighed like the plan itself, and what would make a plan fit that does not.

A change is one that a user can make with one flag or by taking a larger slice. Each is weighed by the same arithmetic with the programs'
memory of the plan; none of them is compiled. This file does not know how anything is weighed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxinfer.config import ConfigError
from jaxinfer.planner.estimate import Choice, Estimate, Wish, estimate, stored_as
from jaxinfer.planner.predict import Kernels
from jaxinfer.quant.find import schemes

HIGH_FRACTION = 0.95
RUNTIME_SHARE, HIGH_SHARE = 0.75, 0.92  # of a GPU's memory: what jax takes by default, and what it may well take
WORTH = 0.03
AUDIT = "audit its price with python -m jaxinfer audit quant --model MODEL --data FILE --schemes"


@dataclass(frozen=True)
class Change:
    """A change in words, the flags that make it, and what comes of it. less: it gives up some of what was asked for."""

    words: str
    flags: str
    made: Estimate
    remark: str = ""
    less: bool = False

    def effect(self, before: Estimate) -> str:
        """What changes, in a few words."""
        if not self.made.fits:
            return "does not fit"
        more = self.made.largest / before.largest if before.largest else 0.0
        parts = [f"fits {more:.1f}x the concurrency" if abs(more - 1) > WORTH and more else ""]
        if not before.fits:
            parts = [f"fits, room for {self.made.largest} sequences of full length"]
        for name, new, old in (
            ("ITL", self.made.decode.seconds, before.decode.seconds),
            ("TTFT", self.made.ttft, before.ttft),
            ("tokens/s", self.made.tokens_per_second, before.tokens_per_second),
        ):
            if abs(new / old - 1) >= WORTH / 3:
                parts.append(f"predicted {(new / old - 1) * 100:+.0f} % {name}")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class _Proposal:
    """A change before it is weighed."""

    words: str
    flags: str
    choice: Choice
    remark: str = ""
    less: bool = False


def changes(now: Estimate, kernels: Kernels) -> Iterator[Change]:
    """Every single change that could be made and weighed: settings, then larger slices with their best mesh."""
    for each in (*_lossless(now.choice), *_lesser(now.choice)):
        weights = stored_as(each.choice.wish.config.model.quantize) or kernels.weights
        made = _weighed(each.choice, replace(kernels, weights=weights), now.programs)
        if made is not None:
            yield Change(each.words, each.flags, made, each.remark, each.less)
    for piece in now.choice.piece.larger()[:3]:
        meshes = [_weighed(Choice(piece, mesh, now.choice.wish, now.choice.devices[:1]), kernels, now.programs) for mesh in piece.meshes()]
        best = max((made for made in meshes if made is not None), key=lambda made: made.score, default=None)
        if best is not None:
            yield Change(f"slice {piece.name}", f"--slice {piece.name}", best)


def next_steps(now: Estimate, found: list[Change], count: int = 3) -> list[Change]:
    """The changes on the same slice that serve the goal best and give up nothing, those that are worth it."""
    least = _goal(now) + WORTH * abs(_goal(now))
    same = [change for change in found if change.made.choice.piece == now.choice.piece and change.made.fits and not change.less]
    helping = [change for change in same if _goal(change.made) >= least or change.made.largest > now.largest * (1 + WORTH)]
    return sorted(helping, key=lambda change: _goal(change.made), reverse=True)[:count]


def remedies(now: Estimate, found: list[Change]) -> list[Change]:
    """Changes that make a plan fit: settings first, then the smallest larger slice."""
    fitting = [change for change in found if change.made.fits]
    own = [change for change in fitting if change.made.choice.piece == now.choice.piece]
    return own + [change for change in fitting if change.made.choice.piece != now.choice.piece][:1]


def _lossless(choice: Choice) -> Iterator[_Proposal]:
    wish, config = choice.wish, choice.wish.config
    for scheme in (scheme for scheme in schemes() if scheme != stored_as(config.model.quantize)):
        other = _with(wish, model=replace(config.model, quantize=scheme))
        yield _Proposal(f"{scheme} weights", f"--quantize {scheme}", replace(choice, wish=other), f"{AUDIT} {scheme}")
    if config.cache.kv_dtype == "auto":
        other = _with(wish, cache=replace(config.cache, kv_dtype="int8"))
        yield _Proposal("int8 keys and values", "--kv int8", replace(choice, wish=other), f"{AUDIT} kv-int8")
    if config.cache.memory_fraction < HIGH_FRACTION:
        words = f"{HIGH_FRACTION * 100:.0f} % of the memory instead of {config.cache.memory_fraction * 100:.0f} %"
        other = _with(wish, cache=replace(config.cache, memory_fraction=HIGH_FRACTION))
        yield _Proposal(words, f"--memory-fraction {HIGH_FRACTION}", replace(choice, wish=other))
    if choice.piece.platform == "gpu" and choice.memory is None:
        memory = int(choice.usable_memory * HIGH_SHARE / RUNTIME_SHARE)
        words = f"{HIGH_SHARE * 100:.0f} % of the card for jax instead of {RUNTIME_SHARE * 100:.0f} %"
        yield _Proposal(words, f"XLA_PYTHON_CLIENT_MEM_FRACTION={HIGH_SHARE}", replace(choice, memory=memory))


def _lesser(choice: Choice) -> Iterator[_Proposal]:
    wish = choice.wish
    if wish.concurrency is not None and wish.concurrency > 1:
        half = wish.concurrency // 2
        other = replace(choice, wish=replace(wish, concurrency=half))
        yield _Proposal(f"{half} sequences at once", f"--concurrency {half}", other, less=True)
    if wish.context > 1024:
        half = wish.context // 2
        shorter = replace(wish, context=half, output=max(1, min(wish.output, half - 1)))
        yield _Proposal(f"contexts of {half} tokens", f"--context {half}", replace(choice, wish=shorter), less=True)


def _with(wish: Wish, **sections: object) -> Wish:
    return replace(wish, config=replace(wish.config, **sections))  # pyright: ignore[reportArgumentType]


def _weighed(choice: Choice, kernels: Kernels, programs: int) -> Estimate | None:
    try:
        return estimate(choice, kernels, programs)
    except (ConfigError, LookupError):
        return None


def _goal(made: Estimate) -> float:
    return -made.decode.seconds if made.choice.wish.goal == "latency" else made.tokens_per_second
