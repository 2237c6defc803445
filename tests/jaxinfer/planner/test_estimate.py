"""Weighing: what fits, how much, how fast, for which goal."""

import jax
import pytest

from jaxinfer.config import EngineConfig, MeshShape, from_arguments
from jaxinfer.models.find import find_shape
from jaxinfer.planner.estimate import Choice, Wish, estimate, kernels_for, stored_as
from jaxinfer.planner.predict import Kernels
from jaxinfer.planner.slices import parse

KERNELS = Kernels("xla", "xla", "bfloat16")


def choice(slice="v6e-4", mesh=(1, 4), *, model="llama-3.1-8b", context=8192, concurrency=64, goal="throughput", price=None, **settings):
    config = from_arguments(EngineConfig, settings)
    wish = Wish(dict(find_shape(model)), config, context, 256, concurrency, goal, price)
    return Choice(parse(slice), MeshShape(*mesh), wish, tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def sharded():
    return estimate(choice(price=2.7), KERNELS)


def test_what_fits_and_how_much(sharded):
    assert sharded.fits and sharded.lacking < 0
    assert sharded.account.weights == pytest.approx(16.06e9 / 4, rel=0.001)
    assert sharded.kv_tokens == 64 * 8192 and sharded.concurrency == 64 == sharded.running


def test_replicas_hold_the_weights_each(sharded):
    whole = estimate(choice(mesh=(4, 1)), KERNELS)
    assert whole.account.weights == pytest.approx(16.06e9, rel=0.001)
    assert not whole.fits and whole.lacking > 2**30
    assert whole.score < sharded.score


def test_what_does_not_fit_says_by_how_much():
    made = estimate(choice("v5e-1", (1, 1), concurrency=1), KERNELS)
    account = made.account
    assert made.lacking == account.weights + account.slots + made.reserved + (account.row + 1) * account.page - account.limit
    assert estimate(choice("v5e-1", (1, 1), concurrency=1, quantize="int8"), KERNELS).lacking < made.lacking - 6e9


def test_the_compiler_has_the_last_word(sharded):
    more = estimate(choice(), KERNELS, programs=12 << 30)
    assert more.programs == 12 << 30 and more.reserved == (12 << 30) * 9 // 8
    assert more.kv_tokens < sharded.kv_tokens and not more.fits


def test_rates_and_cost(sharded):
    assert sharded.itl_loaded > sharded.decode.seconds
    assert sharded.tokens_per_second == pytest.approx(64 / sharded.itl_loaded)
    assert sharded.cost == pytest.approx(2.7 * 4 / 3600 / sharded.tokens_per_second * 1e6)
    assert estimate(choice(), KERNELS).cost is None
    assert sharded.ttft == sharded.prefill.seconds


def test_the_goal_decides_what_is_better():
    few, many = (choice("tpu7x-8", mesh, goal="latency", concurrency=8) for mesh in ((1, 8), (8, 1)))
    assert estimate(few, KERNELS).score > estimate(many, KERNELS).score
    alone = estimate(choice("tpu7x-8", (8, 1), goal="latency", concurrency=None), KERNELS)
    assert alone.running == 1


def test_sequences_are_dealt_out_to_replicas():
    config = choice(mesh=(2, 2), concurrency=7).wish.on(MeshShape(2, 2))
    assert (config.scheduler.max_sequences, config.model.max_model_len, config.execution.mesh) == (4, 8192, (2, 2))
    assert choice(concurrency=None).wish.on(MeshShape(1, 4)).scheduler.max_sequences is None
    assert choice(max_sequences=3).wish.on(MeshShape(2, 2)).scheduler.max_sequences == 3


def test_kernels_are_those_that_auto_takes_for_the_target(monkeypatch):
    assert kernels_for(choice("cpu-4").sizing()) == Kernels("xla", "xla", "float32")
    assert kernels_for(choice("cpu-4", quantize="int8").sizing()).weights == "int8"
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "need jax 0.11" in str(kernels_for(choice("h200x1").sizing()).passed_over)
    assert kernels_for(choice("h200x1", implementation="xla").sizing()).passed_over is None  # as asked
    assert (stored_as("int8,lm_head=keep"), stored_as("*.mlp.*=int4"), stored_as(None)) == ("int8", "mixed", None)


def test_memory_may_be_given():
    given = Choice(**{**vars(choice()), "memory": 20 << 30})
    assert given.sizing().machine.memory == 20 << 30 and choice().usable_memory == 125 * 2**30 // 4
