from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import device_clock


def event(begin, length):
    return SimpleNamespace(start_ns=begin, duration_ns=length)


def test_kernels_of_all_streams_and_nothing_else():
    lines = [
        SimpleNamespace(name=name, events=[event(number, 5)])
        for number, name in enumerate(("Stream #13(Compute)", "XLA Ops", "Stream #14"))
    ]
    planes = [SimpleNamespace(name=name, lines=lines) for name in ("/device:GPU:0", "/host:CPU")]
    assert device_clock.spans_in(SimpleNamespace(planes=planes)) == [(0, 5), (2, 7)]


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([(0, 5), (7, 9)], 7),
        ([(7, 9), (0, 5)], 7),
        ([(0, 5), (3, 8)], 8),
        ([(0, 9), (2, 3), (4, 10)], 10),
        ([(0, 5), (5, 6), (1, 1)], 6),
        ([], 0),
    ],
)
def test_time_counts_once(spans, wanted):
    assert device_clock.covered(spans) == wanted


def test_a_cpu_has_no_such_clock():
    """The profile is there, and has no GPU in it."""
    ran = []
    assert device_clock.busy_seconds(lambda: ran.append(1) or jax.jit(lambda x: x + 1)(jnp.ones(3))) is None
    assert ran == [1]
