"""R24, no hidden host aliasing: R4 once more while every buffer that goes to the devices is overwritten as soon as it was sent.

On CPUs `jax.device_put` may use the host's memory as it is; a step that reads a buffer which the host has changed since would compute
something else. What ran alone, with its memory left in peace, is the measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxinfer.selftest import r4, stand
from jaxinfer.selftest.stand import Stand, Verdict

PROMISE = "no hidden host aliasing: the same tokens while every host buffer is overwritten after it was sent"
ENGINE = True
SPOILT = 77


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    r4.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Run R4's schedules with spoiled buffers."""
    return check(stand.build(vars(args)), args.prompts or r4.PROMPTS["quick" if args.quick else "long"], args.seed)


def check(tested: Stand, prompts: int, seed: int) -> Verdict:
    """Compare every schedule with requests that ran alone and unspoiled."""
    buffers = [0]
    verdict = r4.check(tested, prompts, seed, lambda: spoiling(tested, buffers))
    return Verdict({"buffers_spoilt": buffers[0], **verdict.counts}, verdict.passed and buffers[0] > 0)


@contextmanager
def spoiling(tested: Stand, buffers: list[int]) -> Iterator[None]:
    """While this is open, a buffer that was sent is overwritten; `buffers[0]` counts them."""
    program: Any = tested.engine.program
    send = program._send

    def spoil(values: Any, sharding: Any) -> Any:
        sent = send(values, sharding)
        values.fill(SPOILT)
        buffers[0] += 1
        return sent

    program._send = spoil
    try:
        yield
    finally:
        program._send = send
