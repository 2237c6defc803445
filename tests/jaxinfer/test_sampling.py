"""The sampler against a NumPy twin: exact distributions by chi-square, filters by sorting, draws that depend on seed and position alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer import sampling
from jaxinfer.sampling import RowSettings, Sampled

ROWS, VOCAB = 8192, 16
LOGITS = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)
COUNTS = np.array([0, 3, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0], np.int32)
IN_PROMPT = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], bool)
NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0, "repetition": 1.0, "top_k": 0, "logprobs": -1,
    "position": 0,
}  # fmt: skip


def settings(rows, **changes):
    """The same settings for every row; values may be arrays. The seed defaults to the row's number."""
    values = NEUTRAL | changes
    seed = values.pop("seed", np.stack([np.zeros(rows), np.arange(rows)], axis=1))
    integers = ("top_k", "logprobs", "position")
    arrays = {
        name: np.broadcast_to(np.asarray(value, np.int32 if name in integers else np.float32), rows) for name, value in values.items()
    }
    return RowSettings(
        **{name: jnp.asarray(array) for name, array in arrays.items()}, seed=jnp.asarray(np.broadcast_to(seed, (rows, 2)), jnp.uint32)
    )


@jax.jit
def run(logits, counts, in_prompt, settings):
    return sampling.sample(logits, sampling.penalised(logits, counts, in_prompt, settings), settings)


def draw(given, logits=LOGITS, counts=COUNTS * 0, in_prompt=IN_PROMPT & False) -> Sampled:
    rows = given.position.shape[0]
    spread = lambda array: jnp.broadcast_to(jnp.asarray(array), (rows, array.shape[-1]))
    return jax.tree.map(np.asarray, run(spread(logits), spread(counts), spread(in_prompt), given))


# The twin


def penalised(logits, counts, in_prompt, *, repetition=1.0, frequency=0.0, presence=0.0, **_):
    seen = in_prompt | (counts > 0)
    logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)


def kept(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **_):
    """Which tokens the filters leave, one after the other, by sorting; ties with the last one kept are kept."""
    scaled = logits / temperature
    order = np.sort(scaled)[::-1]
    keep = scaled >= order[min(top_k, len(order)) - 1] if top_k > 0 else np.ones(len(scaled), bool)
    weights = np.where(keep, np.exp(scaled - scaled.max()), 0)
    if top_p < 1:
        ordered = np.sort(weights)[::-1]
        last = np.searchsorted(np.cumsum(ordered), top_p * ordered.sum())
        keep &= weights >= ordered[min(last, len(ordered) - 1)]
    return keep & (weights >= min_p)


def probabilities(logits, counts, in_prompt, **values):
    adjusted = penalised(logits.astype(np.float64), counts, in_prompt, **values)
    weights = np.where(kept(adjusted, **values), np.exp((adjusted - adjusted.max()) / values.get("temperature", 1.0)), 0)
    return weights / weights.sum()


def assert_distributed(tokens, expected, *, significance=1e-3):
    """Chi-square; what the twin excludes may never be drawn, and rare tokens share a cell."""
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    common = expected * len(tokens) >= 10
    cells = lambda array: np.append(array[common], array[~common].sum())
    found, wanted = cells(observed), cells(expected * len(tokens))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    if len(found) > 1:
        assert stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > significance


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 99},
    {"top_p": 0.3},
    {"top_p": 0.8},
    {"top_p": 0.9999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition": 1.7},
    {"repetition": 0.5},
    {"frequency": 0.7},
    {"frequency": -0.4},
    {"presence": 1.2},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.85, "min_p": 0.05, "repetition": 1.3, "frequency": 0.3, "presence": -0.5},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.97, "min_p": 0.01, "repetition": 0.8, "frequency": -0.2, "presence": 0.9},
]


@pytest.mark.parametrize("by", ["seed", "position"])
@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_draws_are_distributed_as_the_twin_says(values, by):
    vary = {"position": np.arange(ROWS), "seed": np.array([3, 4])} if by == "position" else {}
    sampled = draw(settings(ROWS, **values, **vary), counts=COUNTS, in_prompt=IN_PROMPT)
    assert_distributed(sampled.token, probabilities(LOGITS, COUNTS, IN_PROMPT, **values))
    assert sampled.finite.all()


def test_neighbouring_draws_are_independent():
    """Pairs of draws at positions p and p + 1 of one seed, and of seeds s and s + 1 at one position."""
    expected = probabilities(LOGITS, COUNTS * 0, IN_PROMPT & False)
    for vary in ({"position": np.arange(ROWS), "seed": np.array([0, 7])}, {}):
        tokens = draw(settings(ROWS, **vary)).token
        pairs = tokens[0::2] * VOCAB + tokens[1::2]
        assert_distributed(pairs, np.outer(expected, expected).reshape(-1))


def test_both_halves_of_the_seed_and_the_position_matter():
    base = draw(settings(ROWS)).token
    high = draw(settings(ROWS, seed=np.stack([np.ones(ROWS), np.arange(ROWS)], axis=1))).token
    later = draw(settings(ROWS, position=1)).token
    for other in (high, later):
        assert 0.05 < (base == other).mean() < 0.5
    np.testing.assert_array_equal(base, draw(settings(ROWS)).token)


def test_the_filters_keep_what_sorting_keeps():
    """Every row with its own logits and settings; a token may differ only where the cumulated probability meets top_p within rounding."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    logits[: ROWS // 2] = np.round(logits[: ROWS // 2])  # many ties
    choices = {
        "temperature": generator.choice([0.3, 1.0, 2.5], ROWS), "top_k": generator.integers(-1, VOCAB + 3, ROWS),
        "top_p": generator.choice([0.05, 0.5, 0.9, 1.0], ROWS), "min_p": generator.choice([0.0, 0.02, 0.3], ROWS),
    }  # fmt: skip
    choices = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in choices.items()}
    found = np.isfinite(np.asarray(jax.jit(sampling.filtered)(jnp.asarray(logits), settings(ROWS, **choices))))
    wrong = 0
    for row in range(ROWS):
        values = {name: value[row].item() for name, value in choices.items()}
        wrong += (found[row] != kept(logits[row].astype(np.float64), **values)).any()
    assert wrong <= ROWS // 1000
    assert found.any(axis=1).all()


def test_ties_at_a_threshold_are_all_kept():
    logits = np.array([1, 5, 5, 5, 0, 5, -1, -1] + [-9] * 8, np.float32)
    for values in ({"top_k": 2}, {"top_p": 0.2}, {"min_p": 1.0}):
        tokens = draw(settings(ROWS, **values), logits).token
        assert set(tokens.tolist()) == {1, 2, 3, 5}
        assert_distributed(tokens, np.isin(np.arange(VOCAB), [1, 2, 3, 5]) / 4)


def test_greedy_takes_the_first_maximum_whatever_the_seed():
    logits = np.array([1, 5, 5, 0] + [4] * 12, np.float32)
    assert (draw(settings(ROWS, temperature=0.0), logits).token == 1).all()
    assert (draw(settings(ROWS, temperature=0.0, top_k=3, top_p=0.1, min_p=0.9), logits).token == 1).all()
    assert (draw(settings(ROWS, top_k=1)).token == LOGITS.argmax()).all()


def test_greedy_obeys_penalties():
    logits = np.zeros(VOCAB, np.float32)
    logits[:3] = [3.0, 2.9, 2.8]
    counts, prompt = np.zeros(VOCAB, np.int32), np.zeros(VOCAB, bool)
    counts[0], prompt[1] = 2, True
    cold = partial(draw, logits=logits, counts=counts, in_prompt=prompt)
    assert (cold(settings(ROWS, temperature=0.0)).token == 0).all()
    assert (cold(settings(ROWS, temperature=0.0, presence=0.15)).token == 1).all()
    assert (cold(settings(ROWS, temperature=0.0, frequency=0.04)).token == 0).all()
    assert (cold(settings(ROWS, temperature=0.0, frequency=0.06)).token == 1).all()
    assert (cold(settings(ROWS, temperature=0.0, repetition=1.1)).token == 2).all()


def test_penalties_are_what_they_say():
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 3, (64, VOCAB)).astype(np.float32)
    counts, prompt = generator.integers(0, 3, (64, VOCAB)).astype(np.int32), generator.random((64, VOCAB)) < 0.3
    values = {
        name: generator.uniform(low, 2, 64).astype(np.float32) for name, low in (("repetition", 0.3), ("frequency", -2), ("presence", -2))
    }
    found = sampling.penalised(jnp.asarray(logits), jnp.asarray(counts), jnp.asarray(prompt), settings(64, **values))
    for row in range(64):
        wanted = penalised(logits[row], counts[row], prompt[row], **{name: value[row] for name, value in values.items()})
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6, atol=1e-6)


def mixed(rows, generator):
    """Rows of every kind: greedy, filtered, penalised, with logprobs."""
    pick = lambda *values: generator.choice(np.array(values), rows)
    given = settings(
        rows, temperature=pick(0.0, 0.7, 1.0), top_p=pick(0.5, 1.0), top_k=pick(0, 4), min_p=pick(0.0, 0.1), repetition=pick(1.0, 1.4),
        logprobs=pick(-1, 0, 3), position=generator.integers(0, 99, rows),
    )  # fmt: skip
    logits = generator.normal(0, 2, (rows, VOCAB)).astype(np.float32)
    return logits, generator.integers(0, 3, (rows, VOCAB)).astype(np.int32), generator.random((rows, VOCAB)) < 0.2, given


def test_a_draw_does_not_depend_on_what_stands_beside_it():
    """A row at every place of batches of two sizes, among neighbours of every kind: the same token, bit for bit the same logprobs."""
    generator = np.random.default_rng(4)
    device = partial(jax.tree.map, jnp.asarray)
    host = partial(jax.tree.map, np.array)
    rows = host(mixed(8, generator))
    rows[3].logprobs[:] = 2  # without them there would be little to compare
    for kind in range(8):
        mine = jax.tree.map(lambda array, kind=kind: array[kind : kind + 1], rows)
        alone = host(run(*device(mine)))
        for place in (0, 5, 32):
            batch = host(mixed(33, generator))
            jax.tree.map(lambda whole, row, place=place: whole.__setitem__(place, row[0]), batch, mine)
            among = jax.tree.map(lambda array, place=place: array[place : place + 1], host(run(*device(batch))))
            jax.tree.map(np.testing.assert_array_equal, alone, among)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-38, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.linspace(50, 90, VOCAB).astype(np.float32)
    for values in ({}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}):
        assert (draw(settings(ROWS, temperature=temperature, **values), logits).token == VOCAB - 1).all()


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 100.0}, {"top_p": 1e-9}, {"top_k": 2**31 - 1}, {"top_p": 0.9, "top_k": 3, "min_p": 0.5}], ids=str
)
def test_extreme_logits_give_a_possible_token(values):
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 7]] = [3e38, -3e38]
    sampled = draw(settings(ROWS, **values), logits)
    assert (sampled.token == 3).all()
    assert sampled.finite.all()
    same = draw(settings(ROWS, **values), np.full(VOCAB, -3e38, np.float32))
    assert_distributed(same.token, np.full(VOCAB, 1 / VOCAB))


def test_bad_numbers_stay_in_their_row():
    generator = np.random.default_rng(5)
    logits, counts, prompt, given = mixed(33, generator)
    clean = run(jnp.asarray(logits), jnp.asarray(counts), jnp.asarray(prompt), given)
    dirty = logits.copy()
    dirty[4, 2], dirty[9], dirty[20, 0] = np.nan, -np.inf, np.inf
    found = run(jnp.asarray(dirty), jnp.asarray(counts), jnp.asarray(prompt), given)
    bad = np.isin(np.arange(33), [4, 9, 20])
    np.testing.assert_array_equal(np.asarray(found.finite), ~bad)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[~bad], np.asarray(b)[~bad]), clean, found)
    assert ((np.asarray(found.token) >= 0) & (np.asarray(found.token) < VOCAB)).all()


def test_logprobs_are_those_of_the_unmodified_model():
    given = settings(ROWS, temperature=0.5, top_k=3, repetition=2.0, logprobs=5)
    sampled = draw(given, counts=COUNTS, in_prompt=IN_PROMPT)
    exact = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(sampled.logprob, exact[sampled.token], rtol=1e-5, atol=1e-5)
    order = np.argsort(-exact)
    np.testing.assert_array_equal(sampled.top_tokens[17], order[: sampling.reported(VOCAB)])
    np.testing.assert_allclose(sampled.top_logprobs[17], exact[order][: sampling.reported(VOCAB)], rtol=1e-5, atol=1e-5)


def test_logprobs_of_the_drawn_token_alone_are_computed_too():
    sampled = draw(settings(ROWS, logprobs=0))
    assert (sampled.logprob < 0).all()


def test_logprobs_that_nobody_wants_are_not_computed():
    sampled = draw(settings(ROWS))
    assert not sampled.logprob.any()
    assert not sampled.top_logprobs.any()
    assert sampled.top_tokens.shape == (ROWS, sampling.reported(VOCAB))
    assert [sampling.reported(vocab) for vocab in (3, 20, 1000)] == [3, 20, 20]


def test_bits_are_ordered_like_the_numbers():
    values = np.array([-np.inf, -3e38, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 1.0000001, 3e38, np.inf], np.float32)
    keys = np.asarray(sampling._ordered_bits(jnp.asarray(values[None]))[0])
    assert (np.diff(keys.astype(np.int64)) > 0).all()


def test_likeliest_is_argmax():
    logits = np.random.default_rng(6).integers(0, 4, (200, 33)).astype(np.float32)
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), logits.argmax(axis=1))
    assert sampling.likeliest(jnp.full((1, 5), jnp.nan)).tolist() == [4]
