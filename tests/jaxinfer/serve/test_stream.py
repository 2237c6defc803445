"""One call's outputs: merged, in batches, ended by finish, failure or close."""

import asyncio

import pytest

from jaxinfer.request import FinishReason, Output, Request
from jaxinfer.serve.stream import Stream


def outputs(*texts, end=False):
    made = [Output("r", text=text) for text in texts]
    return [*made, Output("r", finish_reason=FinishReason.STOP)] if end else made


def run(scenario):
    async def wrapped():
        closed = []
        return await scenario(Stream([Request("r", (1,))], closed.append), closed)

    return asyncio.run(wrapped())


def test_what_came_meanwhile_comes_in_one_batch():
    async def scenario(stream, closed):
        stream.feed(outputs("a"), 1.0)
        stream.feed(outputs("b", end=True), 2.0)
        batches = [batch async for batch in stream]
        assert [[o.text for o in batch] for batch in batches] == [["a", "b", ""]]
        assert stream.finished
        assert stream.fed == 2.0
        assert not closed
        stream.close()
        stream.close()
        assert closed == [stream]

    run(scenario)


def test_a_reader_waits_for_what_comes():
    async def scenario(stream, closed):
        asyncio.get_running_loop().call_soon(stream.feed, outputs("late", end=True), 1.0)
        assert (await anext(stream))[0].text == "late"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(scenario)


def test_a_failure_comes_after_what_was_there_before():
    async def scenario(stream, closed):
        stream.feed(outputs("a"), 1.0)
        stream.fail(RuntimeError("broken"))
        assert (await anext(stream))[0].text == "a"
        with pytest.raises(RuntimeError, match="broken"):
            await anext(stream)
        with pytest.raises(RuntimeError):
            await stream.accepted

    run(scenario)


def test_close_wakes_the_reader():
    async def scenario(stream, closed):
        asyncio.get_running_loop().call_soon(stream.close)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert closed == [stream]

    run(scenario)


def test_ids_are_named_once():
    async def scenario():
        requests = [Request("a", (1,), index=0), Request("a", (1,), index=1), Request("b", (1,))]
        assert Stream(requests, print).ids == ("a", "b")

    asyncio.run(scenario())
