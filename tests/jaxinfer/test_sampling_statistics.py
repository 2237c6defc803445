"""Exact distributions: the whole chain, everything at once, against a float64 twin that follows the documentation step by step.

Twenty thousand draws for each request that asks for all rules and filters together, by chi-square with Holm's correction (Holm 1979).
Twins with one step wrong are rejected, so the test would notice.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer import sampling
from jaxinfer.batch import Admission
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import ALL_ALLOWED, mask_words
from jaxinfer.sharding import make_mesh
from jaxinfer.step import slots as state
from jaxinfer.step.forward import RowInputs, Sampler

VOCAB, DRAWS, LONGEST = 32, 20_000, 32
SIGNIFICANCE = 1e-3
LOGITS = np.random.default_rng(11).normal(0, 1.5, VOCAB).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A request in the middle of its output."""

    params: SamplingParams
    prompt: tuple[int, ...] = (1, 4, 4, 9, 30)
    output: tuple[int, ...] = (5, 9, 5, 17, 2, 5)
    held: tuple[int, ...] = (31, 8)
    banned: tuple[tuple[int, ...], ...] = ((6,), (2, 5, 14), (5, 20), (9, 9, 10), (1, 5, 9, 5, 17, 2, 5, 22))


ALL = SamplingParams(
    temperature=0.8, top_k=14, top_p=0.9, min_p=0.03, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.25, min_tokens=9,
    logit_bias={3: 1.5, 7: -2.0, 5: 1.0, 20: 3.0}, allowed_token_ids=[token for token in range(VOCAB) if token % 9 != 4], seed=-77,
)  # fmt: skip
CASES = [
    Case(ALL),
    Case(replace(ALL, temperature=2.5, top_k=18, top_p=0.95, min_p=0.3, repetition_penalty=0.7, frequency_penalty=-0.3, seed=5)),
    Case(replace(ALL, temperature=0.4, top_p=0.97, min_p=0.001, presence_penalty=-0.5, seed=2**63 - 1), output=()),
    Case(replace(ALL, top_k=6, top_p=0.7, min_tokens=0, allowed_token_ids=None, seed=0), output=(5, 9) * 6),
    Case(replace(ALL, top_k=0, top_p=1.0, min_p=0.0, seed=12)),
    Case(SamplingParams(seed=3)),
]


# The twin


def adjusted(case, logits=LOGITS):
    """Penalties, biases, exclusions."""
    params, values = case.params, logits.astype(np.float64)
    for token in {*case.prompt, *case.output} if params.repetition_penalty != 1 else ():
        values[token] *= params.repetition_penalty if values[token] <= 0 else 1 / params.repetition_penalty
    for token in set(case.output):
        values[token] -= params.frequency_penalty * case.output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        values[token] += bias
    out = set(case.held) if len(case.output) < params.min_tokens else set()
    out |= {last for *begin, last in case.banned if not begin or case.output[-len(begin) :] == tuple(begin)}
    out |= set() if params.allowed_token_ids is None else set(range(VOCAB)) - set(params.allowed_token_ids)
    values[list(out)] = -np.inf
    return values


def filtered(values, params, *, nucleus=0):
    """Temperature, top-k, top-p, min-p as probabilities. nucleus: tokens too many in the top-p set."""
    weights = np.exp((values - values.max()) / params.temperature)
    if params.top_k > 0:
        weights[weights < np.sort(weights)[-params.top_k]] = 0
    if params.top_p < 1:
        ordered = np.sort(weights)[::-1]
        count = 1 + int((np.cumsum(ordered) < params.top_p * ordered.sum()).sum()) + nucleus
        weights[weights < ordered[count - 1]] = 0
    weights[weights < params.min_p] = 0
    return weights / weights.sum()


def probabilities(case, **wrong):
    return filtered(adjusted(case), case.params, **wrong)


def p_value(tokens, expected):
    """Chi-square; rare tokens share a cell, and what the twin excludes may never be drawn."""
    found = np.bincount(tokens, minlength=VOCAB)
    if found[expected == 0].any():
        return 0.0
    common = expected * len(tokens) >= 10
    cells = lambda array: np.append(array[common], array[~common].sum())
    observed, wanted = cells(found), cells(expected * len(tokens))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue if len(wanted) > 1 else 1.0


def accepted(p_values):
    """Holm: if the smallest survives the strictest threshold, all do."""
    return min(p_values) > SIGNIFICANCE / len(p_values)


# The sampler


SAMPLER = Sampler(len(CASES), Placement(make_mesh({})))
_once = jax.jit(SAMPLER)


@jax.jit
def _often(logits, rows, slots):
    """Rules once for each row, then many draws of it."""
    asked = state.settings(slots, rows.slots, rows.positions)
    values = SAMPLER._adjusted(logits, rows, jnp.full((len(logits), mask_words(VOCAB)), ALL_ALLOWED), slots, asked)
    logits, values, asked = jax.tree.map(lambda array: jnp.repeat(array, DRAWS, axis=0), (logits, values, asked))
    draw = jnp.arange(len(logits), dtype=jnp.int32) % DRAWS
    later = draw < DRAWS // 2
    seed = asked.seed.at[:, 1].add(jnp.where(later, 0, draw).astype(jnp.uint32))
    return sampling.sample(logits, values, replace(asked, position=jnp.where(later, draw, asked.position), seed=seed)).token


_admit = jax.jit(state.admit)


class Sampled:
    """Draws of the device's sampler: every case admitted to a slot; half its draws differ in position, half in seed."""

    def __init__(self, cases):
        slots = jax.tree.map(jnp.asarray, state.neutral(len(cases) + 1, VOCAB))
        for slot, case in enumerate(cases):
            admission = Admission(Request("r", case.prompt, case.params), slot, case.output)
            slots = _admit(slots, state.pack_admission(admission, state.Draws(case.params.seed, case.held, case.banned), LONGEST))
        lengths = [len(case.prompt) + len(case.output) for case in cases]
        each = jnp.arange(len(cases), dtype=jnp.int32)
        self.rows, self.slots = RowInputs(each, jnp.asarray(lengths, jnp.int32), jnp.zeros_like(each)), slots
        self.logits = jnp.tile(LOGITS, (len(cases), 1))

    def once(self):
        """One draw for each case, by the whole sampler as a step runs it."""
        mask = np.full((len(self.rows.slots), mask_words(VOCAB)), ALL_ALLOWED)
        return _once(self.logits, self.rows, mask, self.slots)[1].token

    def often(self):
        """[cases, draws], and among them at each row's own position what `once` drew."""
        return np.asarray(_often(self.logits, self.rows, self.slots)).reshape(len(self.logits), DRAWS)


@pytest.fixture(scope="module")
def sampled():
    return Sampled(CASES)


@pytest.fixture(scope="module")
def drawn(sampled):
    return sampled.often()


def test_everything_at_once_is_distributed_as_documented(drawn):
    p_values = [p_value(tokens, probabilities(case)) for tokens, case in zip(drawn, CASES, strict=True)]
    assert accepted(p_values), p_values


def test_a_step_draws_what_was_counted(sampled, drawn):
    positions = np.asarray(sampled.rows.positions)
    np.testing.assert_array_equal(sampled.once(), drawn[np.arange(len(CASES)), positions])


def without(case, **changes):
    return probabilities(replace(case, params=replace(case.params, **changes)))


FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
PLANTED = {
    "one token too many in the nucleus": lambda case: probabilities(case, nucleus=1),
    "one token too few in the nucleus": lambda case: probabilities(case, nucleus=-1),
    "min-p before temperature": lambda case: without(case, min_p=case.params.min_p ** (1 / case.params.temperature)),
    **{f"no {name}": lambda case, name=name: without(case, **{name: getattr(SamplingParams(), name)}) for name in FILTERS},
    "tokens held no longer": lambda case: probabilities(replace(case, held=())),
    "no bad words": lambda case: probabilities(replace(case, banned=())),
    "a bad word that never began": lambda case: probabilities(replace(case, banned=(*case.banned, (10,)))),
    "every token allowed": lambda case: without(case, allowed_token_ids=None),
    "penalties for the prompt as well": lambda case: probabilities(replace(case, output=(*case.prompt, *case.output))),
}


@pytest.mark.parametrize("fault", PLANTED, ids=str)
def test_a_twin_with_one_fault_is_rejected(drawn, fault):
    """On four requests that ask for nearly everything: each fault shows in at least one of them."""
    p_values = [p_value(tokens, PLANTED[fault](case)) for tokens, case in zip(drawn, CASES[:4], strict=False)]
    assert min(p_values) < 1e-6, p_values


def test_the_limits_of_temperature():
    """Greedy, and temperatures that leave the likeliest token alone."""
    cold = [replace(CASES[i], params=replace(CASES[i].params, temperature=t)) for i, t in enumerate((0.0, 1e-7, 1e-30, 0.0, 1e-30, 1e-7))]
    np.testing.assert_array_equal(Sampled(cold).once(), [adjusted(case).argmax() for case in cold])


def test_ties_are_drawn_alike_however_cold():
    """Four likeliest tokens: all are kept by filters that would leave two, and drawn equally; greedy takes the first."""
    tied = np.where(np.isin(np.arange(VOCAB), [3, 8, 20, 29]), 2.0, LOGITS - 9).astype(np.float32)
    asked = [SamplingParams(temperature=t, top_k=2, top_p=0.3, min_p=0.9, seed=6) for t in (1.0, 1e-6, 0.0)]
    ties = Sampled([Case(params, banned=(), held=()) for params in asked] + CASES[3:])
    ties.logits = jnp.tile(tied, (len(CASES), 1))
    drawn = ties.often()
    expected = np.isin(np.arange(VOCAB), [3, 8, 20, 29]) / 4
    assert accepted([p_value(tokens, expected) for tokens in drawn[:2]])
    assert (drawn[2] == 3).all()
