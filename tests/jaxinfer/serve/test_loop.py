"""The bridge between the engine's thread and the event loop."""

import asyncio
import threading
import time

import pytest

from jaxinfer.request import FinishReason, Request, RequestError, SamplingParams
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.loop import EngineLoop
from jaxinfer.serve.phase import Phase
from tests.fakes import FakeEngine, until


def request(text="hello", name="r", **params):
    engine = FakeEngine()
    return Request(name, tuple(engine.tokenizer.encode(text)), SamplingParams.of(**params))


def drive(engine, scenario, **options):
    """Run a coroutine beside a started loop and stop it afterwards."""
    loop = EngineLoop(lambda progress: engine, **options)

    async def main():
        loop.attach(asyncio.get_running_loop())
        loop.start()
        await asyncio.to_thread(until, lambda: loop.phase is not Phase.LOADING)
        return await scenario(loop)

    try:
        return asyncio.run(main())
    finally:
        engine.release.set()
        loop.stop()


async def read(stream):
    return [output async for batch in stream for output in batch]


def test_outputs_of_two_calls_find_their_way():
    async def scenario(loop):
        one = await loop.submit([request("one", "a")])
        two = await loop.submit([request("two", "b"), request("four", "c")])
        assert loop.open_calls == 2
        first, second = await asyncio.gather(read(one), read(two))
        assert "".join(o.text for o in first) == "one"
        assert "".join(o.text for o in second if o.request_id == "c") == "four"
        for stream in (one, two):
            stream.close()
        assert loop.open_calls == 0

    engine = FakeEngine()
    drive(engine, scenario)
    assert not engine.aborted
    assert engine.closed


def test_a_stream_that_is_closed_early_is_aborted():
    async def scenario(loop):
        stream = await loop.submit([request(max_tokens=200, ignore_eos=True)])
        await anext(stream)
        stream.close()
        await asyncio.to_thread(until, lambda: not engine.has_work)

    engine = FakeEngine(step_seconds=0.002)
    drive(engine, scenario)
    assert engine.aborted == ["r"]
    assert engine.metrics.finished[FinishReason.ABORT] == 1


def test_a_task_that_is_cancelled_while_it_submits_leaves_nothing():
    async def scenario(loop):
        engine.hang = True
        await loop.submit([request("first", "a")])
        await asyncio.to_thread(until, lambda: engine.hanging)
        task = asyncio.create_task(loop.submit([request("second", "b")]))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.release.set()
        await asyncio.to_thread(until, lambda: "b" in engine.aborted)

    engine = FakeEngine()
    drive(engine, scenario)


def test_a_refused_sequence_takes_its_siblings_along():
    async def scenario(loop):
        with pytest.raises(RequestError, match="does not take"):
            await loop.submit([request("fine", "a"), request("REFUSE", "b")])
        await asyncio.to_thread(until, lambda: not engine.has_work)
        assert loop.open_calls == 0

    engine = FakeEngine()
    drive(engine, scenario)
    assert engine.running == 0


def test_a_full_queue_is_429_and_an_unforeseen_fault_ends_one_call():
    async def scenario(loop):
        with pytest.raises(ApiError) as caught:
            await loop.submit([request("a", "a"), request("b", "b")])
        assert caught.value.status == 429
        assert "retry-after" in caught.value.headers
        with pytest.raises(KeyError):
            await loop.submit([request("BROKEN", "c")])
        assert "".join(o.text for o in await read(await loop.submit([request("fine", "d")]))) == "fine"

    drive(FakeEngine(queue_limit=1), scenario)


def test_an_engine_that_raises_ends_every_call():
    changes = []

    async def scenario(loop):
        loop.on_change = changes.append
        engine.step_seconds = 0.01
        stream = await loop.submit([request(ignore_eos=True, max_tokens=200)])
        await anext(stream)
        engine.crash = True
        with pytest.raises(ApiError) as caught:
            await read(stream)
        assert caught.value.status == 503
        assert "secret" not in str(caught.value)
        assert isinstance(loop.failure, RuntimeError)
        with pytest.raises(ApiError):
            await loop.submit([request()])
        with pytest.raises(ApiError):
            _ = loop.engine

    engine = FakeEngine()
    drive(engine, scenario)
    assert changes == [Phase.FAILED]


def test_while_it_loads_and_when_loading_fails():
    gate = threading.Event()

    def factory(progress):
        progress("compile", 3, 12)
        progress("read", 40, 50)
        progress("read", 50, 50)
        gate.wait(10)
        raise ValueError("no such model")

    loop = EngineLoop(factory)
    loop.start()
    until(lambda: loop.stage.name == "compile" and len(loop._stages) == 2)
    assert "compiling 3 of 12" in str(loop.unavailable())
    assert not loop.stalled
    with pytest.raises(ApiError):
        _ = loop.engine
    gate.set()
    until(lambda: loop.phase is Phase.FAILED)
    assert isinstance(loop.failure, ValueError)
    assert loop.loaded is None


def test_draining_takes_nothing_new_and_lets_the_old_go_on():
    async def scenario(loop):
        stream = await loop.submit([request("going on")])
        loop.drain()
        with pytest.raises(ApiError, match="shutting down"):
            await loop.submit([request("new", "n")])
        assert "".join(o.text for o in await read(stream)) == "going on"

    drive(FakeEngine(step_seconds=0.002), scenario)


def test_a_hang_is_seen_and_idleness_is_none():
    async def scenario(loop):
        assert not loop.stalled
        engine.hang = True
        stream = await loop.submit([request()])
        await asyncio.to_thread(until, lambda: loop.stalled)
        engine.hang = False
        engine.release.set()
        await read(stream)
        await asyncio.to_thread(until, lambda: not loop.stalled)

    engine = FakeEngine()
    drive(engine, scenario, stall_seconds=0.2)


def test_an_engine_that_spins_without_progress_is_hung():
    class Spinning(FakeEngine):
        def step(self):
            time.sleep(0.001)
            return []

    async def scenario(loop):
        stream = await loop.submit([request()])
        await asyncio.to_thread(until, lambda: loop.stalled)
        stream.close()

    drive(Spinning(), scenario, stall_seconds=0.2)


def test_stop_ends_open_calls():
    async def scenario(loop):
        stream = await loop.submit([request(ignore_eos=True, max_tokens=200)])
        await asyncio.to_thread(loop.stop)
        with pytest.raises(ApiError, match="stopped"):
            await read(stream)

    engine = FakeEngine(step_seconds=0.005)
    drive(engine, scenario)
    assert engine.closed


def test_one_wake_up_of_the_event_loop_per_step():
    async def scenario(loop):
        seen = []
        loop.observer = lambda outputs, now: seen.append(len(outputs))
        engine.hang = True
        stream = await loop.submit([request("same size", str(i)) for i in range(8)])
        engine.hang = False
        engine.release.set()
        await read(stream)
        assert set(seen) == {8}

    engine = FakeEngine()
    drive(engine, scenario)
