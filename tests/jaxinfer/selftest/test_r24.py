"""R24 holds on the tiny engine, and sees a step that relies on a buffer after it was sent."""

import pytest

from jaxinfer.selftest import r4, r24


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    every = r4.schedules
    monkeypatch.setattr(r4, "schedules", lambda *args: {name: every(*args)[name] for name in ("full batch", "prefix hit", "overlap off")})


def test_it_holds(tested):
    send = tested.engine.program._send
    verdict = r24.check(tested, 3, 0)
    assert verdict.passed, verdict.counts
    assert verdict.counts["buffers_spoilt"] > 50 and tested.engine.program._send == send


def test_a_buffer_that_is_used_again_is_seen(tested, monkeypatch):
    program = tested.engine.program
    forward = program.forward

    def twice(packed, *rest, **named):
        program._send(packed.buffer, program._by_replica)
        return forward(packed, *rest, **named)

    monkeypatch.setattr(program, "forward", twice)
    verdict = r24.check(tested, 3, 0)
    assert not verdict.passed and verdict.counts["faults"]
