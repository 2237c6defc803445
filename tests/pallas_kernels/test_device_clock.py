from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import device_clock
from pallas_kernels.device_clock import Kernel, Span


def event(begin, length, name="k"):
    return SimpleNamespace(start_ns=begin, duration_ns=length, name=name)


def test_kernels_of_all_streams_and_nothing_else():
    names = ("Stream #13(Compute)", "XLA Ops", "Stream #14")
    lines = [SimpleNamespace(name=name, events=[event(number, 5)]) for number, name in enumerate(names)]
    planes = [SimpleNamespace(name=name, lines=lines) for name in ("/device:GPU:0", "/host:CPU")]
    assert device_clock.spans_in(SimpleNamespace(planes=planes)) == [(0, 5, "k"), (2, 7, "k")]


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
    assert device_clock.covered(Span(*span, "k") for span in spans) == wanted


def test_kernels_of_a_kind_are_one():
    spans = [Span(0, 1000, "fusion_1"), Span(10, 3010, "gemm"), Span(5, 2005, "fusion.27"), Span(0, 10, "m64n8")]
    found = device_clock.by_name(spans)
    assert {kernel.name for kernel in found[:2]} == {"fusion", "gemm"}
    assert {kernel.name: kernel.runs for kernel in found} == {"fusion": 2, "gemm": 1, "m64n8": 1}
    assert found[-1] == Kernel("m64n8", 1, pytest.approx(1e-8))
    assert [kernel.seconds for kernel in found] == sorted((kernel.seconds for kernel in found), reverse=True)


def test_a_cpu_has_no_such_clock():
    """The profile is there, and has no GPU in it."""
    ran = []
    assert device_clock.busy_seconds(lambda: ran.append(1) or jax.jit(lambda x: x + 1)(jnp.ones(3))) is None
    assert ran == [1]
