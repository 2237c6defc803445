"""Stages in words, and when an engine counts as hung."""

import pytest

from jaxinfer.serve.phase import Pulse, Stage


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage(), "starting"),
        (Stage("compile", 3, 12), "compiling 3 of 12"),
        (Stage("read", 0, 0), "reading weights"),
        (Stage("shard", 1, 2), "placing weights 50 %"),
    ],
)
def test_stages(stage, words):
    assert str(stage) == words


def test_quiet_is_measured_from_the_last_progress_and_by_the_slowest_step():
    pulse = Pulse()
    assert not pulse.quiet(60.0)
    pulse.last -= 61.0
    assert pulse.quiet(60.0)
    pulse.beat(20.0)
    pulse.last -= 61.0
    assert not pulse.quiet(60.0), "an engine whose steps take 20 s is not hung after 61 s"
    pulse.last -= 20.0
    assert pulse.quiet(60.0)
