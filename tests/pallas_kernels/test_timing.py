"""The timed program makes every call, on the copies in turn, and what is donated goes around. No times are judged."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import timing
from pallas_kernels.timing import Settings, Timing


class Result(NamedTuple):
    out: jax.Array
    pool: jax.Array


PURE = SimpleNamespace(donates=(), rotates=("x", "y"), cost=lambda inputs: "cost")
DONATES = SimpleNamespace(donates=("pool",), rotates=("pool",), cost=lambda inputs: "cost")


def make(seed):
    x, y = jax.random.normal(jax.random.key(seed), (2, 16, 16))
    return {"x": x, "y": y, "scale": jnp.float32(2)}


def test_no_call_is_left_out():
    arguments = timing._arguments(PURE, make(0), make, 3)
    program = timing.program_of(PURE, lambda inputs: inputs["x"] @ inputs["y"] * jnp.exp(inputs["scale"]), arguments, 9)
    lowered = program.lower(*arguments)
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    assert text.count("stablehlo.dot_general") == 1 and text.count(" call @") == 9, "lowered once"
    assert len(re.findall(r"= f32[^=]* dot\(|custom-call\(.*matmul", compiled)) == 9, "though there are three copies only"
    results = np.asarray(program(*arguments)[1])
    assert len({result.tobytes() for result in results}) == 9 == timing._most_distinct(PURE, arguments)


def test_what_is_donated_goes_around():
    def pool(seed):
        return {"pool": jnp.full((4,), 100.0 * seed), "step": jnp.float32(1)}

    def run(inputs):
        return Result(inputs["pool"].sum(), inputs["pool"] + inputs["step"])

    arguments = timing._arguments(DONATES, pool(0), pool, 2)
    donated, results = timing.program_of(DONATES, run, arguments, 5)(*arguments)
    assert [float(x["pool"][0]) for x in donated] == [3, 102] and [float(*x) for x in results] == [0, 400, 4, 404, 8]
    found = timing.measure(DONATES, run, pool, Settings(repeat=2, most_calls=3, copies=2))
    assert len(found.seconds) == 2 and 1 <= found.calls <= 3 and found.cost == "cost"


def test_calls_grow_until_dispatch_does_not_count(monkeypatch):
    """Kernels of 10 us behind 60 us of dispatch: 240 calls a program."""
    monkeypatch.setattr(timing, "_dispatch", lambda arguments: 60e-6)
    monkeypatch.setattr(timing, "program_of", lambda case, run, like, calls: calls)
    monkeypatch.setattr(timing, "_warm", lambda calls, arguments: (calls, arguments))
    monkeypatch.setattr(timing, "_round", lambda calls, arguments: (60e-6 + calls * 10e-6, arguments))
    found = timing.measure(DONATES, lambda inputs: Result(inputs["pool"], inputs["pool"]), lambda seed: {"pool": jnp.ones(4)},
                           Settings(most_calls=512))  # fmt: skip
    fields = found.fields()
    assert fields["calls_per_program"] == 240 and fields["dispatch_share"] <= 0.03
    assert abs(fields["microseconds"] - 10.25) < 1e-6


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "CACHE", 1000)
    arguments = timing._arguments(DONATES, {"pool": np.zeros(100)}, lambda seed: {"pool": np.zeros(100)}, None)
    assert len(arguments.donated) == 5


def test_the_median_counts():
    assert Timing([1e-6, 5e-6, 2e-6], 10, 1e-6, None).fields()["microseconds"] == 2


def test_a_device_that_has_a_clock_is_asked(monkeypatch):
    """Three rounds of three runs of 16 calls over two copies; the host's clock is not looked at."""
    busy = iter([4.8e-3, 9.6e-3, 2.4e-3])

    def asked(some):
        some()
        return next(busy)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "busy_seconds", asked)
    monkeypatch.setattr(timing, "_dispatch", None)

    def pool(seed):
        return {"pool": jnp.zeros(4), "step": jnp.float32(1)}

    found = timing.measure(DONATES, lambda inputs: Result(inputs["pool"].sum(), inputs["pool"] + inputs["step"]), pool, Settings(copies=2))
    assert found.calls == 16 and found.clock == "device" and found.dispatch == 0
    np.testing.assert_allclose(found.seconds, [1e-4, 2e-4, 5e-5])
    assert found.fields()["clock"] == "device" and abs(found.fields()["microseconds"] - 100) < 1e-9


def test_a_device_without_a_clock_is_timed_by_the_host(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "busy_seconds", lambda some: None)
    found = timing.measure(DONATES, lambda inputs: Result(inputs["pool"].sum(), inputs["pool"] + 1), lambda seed: {"pool": jnp.zeros(4)},
                           Settings(most_calls=2, copies=2))  # fmt: skip
    assert found.clock == "host" and found.fields()["clock"] == "host"
