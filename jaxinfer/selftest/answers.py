"""Whether two answers to one request are the same, and if not, whether rounding explains it.

Where bits are promised, tokens and the floats of all reported log probabilities must be equal. Elsewhere two programs of different shapes
may round differently, so a token may differ where two candidates are as good as equal. Then three things are demanded as long as both
answers have the same text:

    drift       log probabilities that both report for a token differ by no more than the bound
    near tie    where the tokens part, the scores of the two drawn tokens differ by no more than the bound; the score of a token is
                log probability / temperature + the Gumbel noise of (seed, position), which is what the sampler maximises
    the same end of both, if the tokens never part

bound = DRIFT[dtype] x sqrt(2 x layers) x size of the logits, taken as the largest log probability reported there (at least 1). Each
layer rounds what it adds twice, and independent roundings add up as a root. DRIFT is 3 units in the last place of bfloat16 and float16,
whose sums are kept in float32, and 32 of float32, whose sums round as they go; it was set after a run of the demo model in bfloat16 (8
layers), whose largest drift was 0.6 of this bound. Tallies report drift in units of the bound. A sampled request with filters, penalties
or biases has no score that is known outside of the sampler: in float32 its tokens must be equal, in narrower numbers only drift is judged
and the difference is counted as `unjudged`. This file does not know how answers came about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxinfer.request import Request, SamplingParams, TokenLogprob
from jaxinfer.selftest.stand import Answer, Answers

DRIFT = {"float32": 32 * 2.0**-24, "float16": 3 * 2.0**-11, "bfloat16": 3 * 2.0**-8}
KEPT = 5

Noise = Callable[[int, int, int], float]  # seed, position, token -> Gumbel noise


@dataclass
class Tally:
    """What comparing counted. `drift` is the largest, in units of the bound; `faults` are differences that nothing explains."""

    sequences: int = 0
    tokens: int = 0
    differing_sequences: int = 0
    differing_tokens: int = 0
    near_ties: int = 0
    unjudged: int = 0
    drift: float = 0.0
    faults: int = 0
    first_faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Count a fault, and keep its text if it is among the first."""
        self.faults += 1
        if self.faults <= KEPT:
            self.first_faults.append(text)

    def figures(self) -> dict[str, Any]:
        """Everything as fields of a row, the share of differing tokens included."""
        share = self.differing_tokens / max(1, self.tokens)
        found = asdict(self) | {"drift": round(self.drift, 4), "differing_share": round(share, 6)}
        return {name: value for name, value in found.items() if value != []}


@dataclass(frozen=True)
class Judge:
    """Compares answers. exact: bits are promised. dtype: what the model computes in. roundings: sqrt(2 x layers)."""

    exact: bool
    dtype: str
    noise: Noise
    roundings: float = 1.0

    def compare(self, requests: list[Request], expected: Answers, found: Answers) -> Tally:
        """Compare the answers to all requests."""
        tally = Tally()
        for request in requests:
            self._compare(request, expected[request.key], found[request.key], tally)
        return tally

    def _compare(self, request: Request, one: Answer, other: Answer, tally: Tally) -> None:
        pairs = list(zip(one.tokens, other.tokens, strict=False))
        parted = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
        tally.sequences += 1
        tally.tokens += len(one.tokens)
        tally.differing_sequences += parted is not None
        tally.differing_tokens += sum(left != right for left, right in pairs)
        if parted is None and (len(one.tokens) != len(other.tokens) or one.reason != other.reason):
            tally.fault(f"{request.key}: one answer ends with {one.reason}, the other with {other.reason}")
        elif self.exact:
            if parted is not None or one.scores != other.scores:
                where = next((at for at, (left, right) in enumerate(pairs_of(one, other)) if left != right), parted)
                tally.fault(f"{request.key}: not the same bits at output {where}")
        else:
            self._judge(request, one, other, parted, tally)

    def _judge(self, request: Request, one: Answer, other: Answer, parted: int | None, tally: Tally) -> None:
        same = len(pairs_of(one, other)) if parted is None else parted + 1
        for at, (left, right) in enumerate(pairs_of(one, other)[:same]):
            drift = drift_of(left, right) / self.bound(left, right)
            tally.drift = max(tally.drift, drift)
            if drift > 1:
                tally.fault(f"{request.key}: log probabilities drift by {drift:.3g} bounds at output {at}")
                return
        if parted is None:
            return
        if not judged(request.params) and self.dtype != "float32":
            tally.unjudged += 1
        elif judged(request.params) and parted < len(one.scores) and self._tied(request, one.scores[parted], other.scores[parted], parted):
            tally.near_ties += 1
        else:
            tally.fault(f"{request.key}: other tokens from output {parted} on, and no near tie")

    def bound(self, one: TokenLogprob, other: TokenLogprob) -> float:
        """How far rounding may move a log probability (see above), in nats."""
        size = max(1.0, *(abs(score) for side in (one, other) for _, score in (*side.top, (side.token, side.logprob))))
        return DRIFT[self.dtype] * self.roundings * size

    def _tied(self, request: Request, one: TokenLogprob, other: TokenLogprob, at: int) -> bool:
        bound, params, position = self.bound(one, other), request.params, len(request.prompt) + at
        gap = one.logprob - other.logprob
        if params.greedy:
            return abs(gap) <= bound
        seed = params.seed or 0
        noise = self.noise(seed, position, one.token) - self.noise(seed, position, other.token)
        return abs(gap / params.temperature + noise) <= bound / params.temperature


def pairs_of(one: Answer, other: Answer) -> list[tuple[TokenLogprob, TokenLogprob]]:
    """Scores of both answers, output by output."""
    return list(zip(one.scores, other.scores, strict=False))


def drift_of(one: TokenLogprob, other: TokenLogprob) -> float:
    """The largest difference between log probabilities that both report for the same token; 0 when they share none."""
    left, right = (dict((*side.top, (side.token, side.logprob))) for side in (one, other))
    return max((abs(left[token] - right[token]) for token in left.keys() & right.keys()), default=0.0)


def judged(params: SamplingParams) -> bool:
    """Whether the sampler's score of a token follows from its log probability: no filter, penalty, bias or token held back."""
    plain = SamplingParams()
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens")
    names += () if params.greedy else ("top_p", "top_k", "min_p")
    return all(getattr(params, name) == getattr(plain, name) for name in names)


def gumbel(vocab: int) -> Noise:
    """The sampler's noise, computed again."""
    import jax
    import numpy as np

    from jaxinfer import sampling

    drawn: dict[tuple[int, int], np.ndarray] = {}
    make = jax.jit(sampling._noise, static_argnums=2)

    def noise(seed: int, position: int, token: int) -> float:
        if (seed, position) not in drawn:
            words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
            drawn[seed, position] = np.asarray(make(words, np.int32(position), vocab))
        return float(drawn[seed, position][token])

    return noise
