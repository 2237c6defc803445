"""What routes share: the model's name, its limits, validated calls."""

import asyncio
import threading

import pytest

from jaxinfer.config import ServerConfig
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.loop import EngineLoop
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.phase import Phase
from jaxinfer.serve.schema import CompletionBody
from tests.fakes import FakeEngine, until


@pytest.fixture
def context():
    loop = EngineLoop(lambda progress: FakeEngine())
    loop.start()
    until(lambda: loop.phase is Phase.READY)
    yield Context(ServerConfig(), loop, Metrics(lambda: loop.loaded))
    loop.stop()


def test_names_and_limits(context):
    assert context.model == "fake"
    assert (context.limits.vocab_size, context.limits.max_model_len) == (262, 256)
    context.check_model(None)
    context.check_model("fake")
    with pytest.raises(ApiError) as caught:
        context.check_model("../fake")
    assert caught.value.status == 404


def test_a_body_becomes_a_call(context):
    made = asyncio.run(context.call(CompletionBody(prompt=["ab", "c"], n=2, novelty=1)))
    assert len(made.sequences) == 4
    assert made.model == "fake"
    assert made.sequences[0].params.temperature == 0.5, "the model's own default"


def test_slow_work_leaves_the_event_loop(context):
    async def where():
        return await context.in_thread(lambda: threading.current_thread().name)

    assert asyncio.run(where()).startswith("tokenise")


def test_nothing_is_validated_before_the_model_is_there():
    loop = EngineLoop(lambda progress: FakeEngine())
    context = Context(ServerConfig(), loop, Metrics(lambda: loop.loaded))
    with pytest.raises(ApiError) as caught:
        asyncio.run(context.call(CompletionBody(prompt="a")))
    assert caught.value.status == 503
