"""Teacher forcing against its oracle: float64 NumPy over the logits of two models that were run plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.audit import forced
from jaxinfer.audit.forced import Text
from jaxinfer.cache.kv import PoolShape
from jaxinfer.models.graph import Quantization
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.keys import POOL, ProgramConfig
from jaxinfer.step.program import Program
from tests.driving import PAGE_SIZE, Driver

BUCKET = Bucket(32, 4, 0)


def program(driver):
    """Weights and settings, nothing compiled but the pool."""
    config = ProgramConfig(driver.graph, driver.placement, PoolShape(2, PAGE_SIZE), (BUCKET,), max_sequences=1, max_tokens=64, threads=1)
    made = Program(config)
    made.compile(lambda *_: None, [POOL])
    made.load(driver.leaves)
    return made


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)


@pytest.fixture(scope="module")
def drivers():
    return Driver.golden("biased"), Driver.golden("biased", quantization=Quantization("int8"))


def test_the_divergence_is_that_of_float64_over_the_whole_vocabulary(drivers, monkeypatch):
    monkeypatch.setattr(forced, "STEP", 32)
    random = np.random.default_rng(5)
    texts = [Text(tuple(random.integers(0, 128, length).tolist()), first) for length, first in ((9, 4), (17, 1), (45, 38), (2, 1))]
    traces = forced.compare(program(drivers[0]), program(drivers[1]), texts)
    for (tokens, first), trace in zip(texts, traces, strict=True):
        p, q = (log_softmax(driver.logits([tokens], [[min(len(tokens), 20)]])[0])[first - 1 : -1] for driver in drivers)
        exact = (np.exp(p) * (p - q)).sum(-1)
        assert trace.first == first and exact.max() > 1e-6
        np.testing.assert_allclose(trace.divergence, exact, rtol=2e-3, atol=2e-7)
        at = np.arange(len(p)), np.asarray(tokens[first:])
        np.testing.assert_allclose(trace.reference, p[at], atol=2e-5)
        np.testing.assert_allclose(trace.other, q[at], atol=2e-5)
        np.testing.assert_array_equal(trace.reference_top[:, 0], p.argmax(-1))
        np.testing.assert_allclose(np.sort(trace.other_top_logprobs, -1)[:, ::-1], np.sort(q, -1)[:, :-4:-1], atol=2e-5)


def test_a_model_does_not_diverge_from_itself():
    logits = jnp.asarray(np.random.default_rng(6).normal(0, 9, (5, 300)), jnp.float32)
    found = forced.compared(logits, logits, jnp.arange(5, dtype=jnp.int32))
    assert found.divergence.tolist() == [0.0] * 5 and (found.reference == found.other).all()


@pytest.mark.parametrize(
    ("p", "q"),
    [([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), ([9.0, 0.0, -80.0], [0.0, 9.0, 80.0]), ([0.0, 1.0, 2.0], [100.0, 101.0, 102.0])],
)
def test_divergence_of_given_logits(p, q):
    logits = [jnp.asarray([values], jnp.float32) for values in (p, q)]
    found = jax.jit(forced.compared)(*logits, jnp.asarray([2], jnp.int32))
    exact_p, exact_q = (log_softmax(np.asarray([values])) for values in (p, q))
    np.testing.assert_allclose(found.divergence, (np.exp(exact_p) * (exact_p - exact_q)).sum(-1), rtol=1e-5, atol=1e-6)


def test_what_is_impossible_under_the_other_model_is_infinite_and_nan_stays():
    p = jnp.asarray([[0.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]], jnp.float32)
    q = jnp.asarray([[0.0, -jnp.inf, 0.0], [jnp.nan, 0.0, 0.0]], jnp.float32)
    found = forced.compared(p, q, jnp.asarray([0, 0], jnp.int32)).divergence
    assert np.isposinf(found[0]) and np.isnan(found[1])


def test_texts_are_packed_in_order_and_long_ones_go_alone():
    texts = [Text((0,) * length, 1) for length in (11, 21, 3, 71, 2, 2, 2, 2, 2)]
    found = list(forced.steps(texts, BUCKET, page_size=4))
    assert [[(p.text, p.start, p.size) for p in step] for step in found] == [
        [(0, 0, 10), (1, 0, 20), (2, 0, 2)], [(3, 0, 32)], [(3, 32, 32)], [(3, 64, 6)],
        [(4, 0, 1), (5, 0, 1), (6, 0, 1), (7, 0, 1)], [(8, 0, 1)],
    ]  # fmt: skip
    for step in found:
        pages = [page for piece in step for page in piece.pages]
        assert 0 not in pages and len(set(pages)) == len(pages)
        assert all(len(piece.pages) * 4 >= piece.start + piece.size for piece in step)


@pytest.mark.parametrize(("lengths", "tokens"), [((2,), 32), ((40, 30), 128), ((400, 400), 512), ((9000,), 512)])
def test_one_shape_for_all_steps(lengths, tokens):
    bucket = forced.bucket_for([Text((0,) * length, 1) for length in lengths])
    assert (bucket.tokens, bucket.decode_rows) == (tokens, 0) and bucket.tokens % forced.BLOCK == 0
