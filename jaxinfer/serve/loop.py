"""The engine's own thread, and the bridge between it and the event loop.

Exactly one thread touches the engine. Others hand it small jobs through a queue (`submit`, and what `Stream.close` asks for); it takes
them between steps and hands outputs back once per step with `call_soon_threadsafe`. Life: `start` -> loading -> ready -> draining ->
stopped, or failed when the engine raises: then every open call ends with an error and the process is expected to exit.
This file does not know about HTTP routes, texts or tokenizers.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxinfer.request import Output, QueueFull, Request, RequestError
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.phase import Phase, Pulse, Stage
from jaxinfer.serve.shadow import Shadow
from jaxinfer.serve.stream import Stream

logger = logging.getLogger(__name__)

STALL_SECONDS = 8.0  # without forward progress for so long, the engine counts as hung
IDLE_SECONDS = 1.0  # an idle thread shows that it lives this often

Progress = Callable[[str, int, int], None]
Factory = Callable[[Progress], Any]
Observer = Callable[[Sequence[Output], float], None]
Job = Callable[[Any], None]


class EngineLoop:
    """Owns the thread that owns the engine.

    phase, stage: for /health. failure: what ended the engine. on_change: called with each new phase and each report of a stage,
    from whatever thread it comes.
    shadow: checks drafts while nobody asks for anything.
    observer: called on the event loop with the outputs of each step and the time (monotonic seconds).
    """

    def __init__(self, factory: Factory, *, stall_seconds: float = STALL_SECONDS, shadow: Shadow | None = None) -> None:
        self.phase = Phase.LOADING
        self.stage = Stage()
        self.failure: BaseException | None = None
        self.on_change: Callable[[Phase | Stage], None] = _ignore
        self.observer: Observer = _unobserved
        self._factory = factory
        self._shadow = shadow or Shadow(0.0)
        self._stall_seconds = stall_seconds
        self._stages: dict[str, Stage] = {}
        self._engine: Any = None
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def engine(self) -> Any:
        """The loaded engine, for what never changes: tokenizer, info, defaults; and its counters.

        Raises:
            ApiError: 503 while it is loading or after it failed.
        """
        if self._engine is None or self.phase is Phase.FAILED:
            raise self.unavailable()
        return self._engine

    @property
    def loaded(self) -> Any:
        """The engine, or None while there is none."""
        return self._engine

    @property
    def open_calls(self) -> int:
        """Calls that have not ended."""
        return len(set(map(id, self._streams.values())))

    @property
    def stalled(self) -> bool:
        """Whether the engine has made no progress for too long while it should have."""
        if self.phase not in (Phase.READY, Phase.DRAINING):
            return False
        return not self._thread.is_alive() or self._pulse.quiet(self._stall_seconds)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the event loop that outputs are delivered to; before the first `submit`."""
        self._loop = loop

    def unavailable(self) -> ApiError:
        """The answer to a request that cannot be taken now."""
        reasons = {
            Phase.LOADING: f"the model is loading ({self.stage}); try again soon",
            Phase.DRAINING: "the server is shutting down and takes no new requests; try another one",
            Phase.FAILED: "the engine has failed and the server is going down; try again once it is back",
        }
        message = reasons.get(self.phase, "the server has stopped; try again once it is back")
        return ApiError(503, message, code=self.phase.value)

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Hand sequences to the engine and return their stream once it took all of them (or none).

        Raises:
            ApiError: 503 while not ready, 429 when too many requests wait.
            RequestError: the engine refused one.
        """
        if self.phase is not Phase.READY:
            raise self.unavailable()
        stream = Stream(requests, self._leave)
        for request_id in stream.ids:
            self._streams[request_id] = stream
        self._jobs.put(lambda engine: self._add(engine, stream))
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    def drain(self) -> None:
        """Take no new calls from now on; open ones go on."""
        if self.phase is Phase.READY:
            self._enter(Phase.DRAINING)

    def stop(self, timeout: float = 5.0) -> bool:
        """End the engine in good order; False if its thread did not end in time (it is loading, or hung)."""
        self._jobs.put(_raise_stop)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the event loop's side ---------------------------------------------------------------------------------------

    def _leave(self, stream: Stream) -> None:
        ids = stream.ids
        for request_id in ids:
            self._streams.pop(request_id, None)
        if not stream.finished and self.phase in (Phase.READY, Phase.DRAINING):
            self._jobs.put(lambda engine: _abort(engine, ids))

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        self.observer(outputs, now)
        batches: dict[str, list[Output]] = {}
        for output in outputs:
            batches.setdefault(output.request_id, []).append(output)
        for request_id, batch in batches.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.feed(batch, now)

    def _fail_all(self) -> None:
        for stream in set(self._streams.values()):
            stream.fail(self.unavailable())

    # -- the engine thread's side ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._engine = self._factory(self._report)
            self._pulse.beat()
            self._enter(Phase.READY)
            while True:
                self._take_jobs()
                if self._engine.has_work:
                    self._step()
        except _Stop:
            self._enter(Phase.STOPPED)
            self._engine.shutdown()
        except BaseException as error:
            self.failure = error
            if self._engine is not None:
                logger.exception("the engine failed; every open request ends with an error")
            self._enter(Phase.FAILED)
        finally:
            self._call_soon(self._fail_all)

    def _step(self) -> None:
        began = time.monotonic()
        before = self._engine.metrics.steps_total
        made = self._engine.step()
        outputs = self._shadow.take(self._engine, made)
        if outputs:
            self._call_soon(self._dispatch, outputs)
        if made or self._engine.metrics.steps_total != before:  # a step that ran no batch and said nothing is no progress
            self._pulse.beat(time.monotonic() - began)

    def _take_jobs(self) -> None:
        """Run every waiting job; with nothing else to do, wait for one."""
        while not self._engine.has_work or not self._jobs.empty():
            if not self._engine.has_work:
                self._pulse.beat()
                if self._jobs.empty() and self._shadow.begin(self._engine):
                    return
            try:
                job = self._jobs.get(timeout=min(IDLE_SECONDS, self._stall_seconds / 4))
            except queue.Empty:
                continue
            self._shadow.give_way(self._engine)
            job(self._engine)

    def _add(self, engine: Any, stream: Stream) -> None:
        """Give every sequence of a call to the engine; if one is refused none stays. A fault here ends this call alone."""
        try:
            for request in stream.requests:
                engine.add(request)
        except Exception as error:
            _abort(engine, stream.ids)
            if not isinstance(error, RequestError):
                logger.exception("the engine failed to take a request")
            self._call_soon(stream.fail, _refusal(error))
        else:
            for request in stream.requests:
                self._shadow.watch(request)
            self._call_soon(_accept, stream)

    def _report(self, name: str, done: int, total: int) -> None:
        """Note progress; of stages that run side by side the one reported last is shown until it is done."""
        self._stages[name] = Stage(name, done, total)
        unfinished = [stage for stage in self._stages.values() if stage.done < stage.total]
        self.stage = self._stages[name] if done < total or not unfinished else unfinished[0]
        self.on_change(self._stages[name])

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.on_change(phase)

    def _call_soon(self, callback: Callable[..., None], *values: Any) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(callback, *values)
        except RuntimeError:  # the event loop has closed: nobody waits any more
            logger.debug("an output came after the event loop had closed")


class _Stop(Exception):
    """Ends the engine's thread."""


def _abort(engine: Any, ids: Sequence[str]) -> None:
    for request_id in ids:
        engine.abort(request_id)


def _raise_stop(engine: Any) -> None:
    raise _Stop


def _accept(stream: Stream) -> None:
    if not stream.accepted.done():
        stream.accepted.set_result(None)


def _refusal(error: Exception) -> Exception:
    """What the client hears. A full queue is not the request's fault: it may come back."""
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; this server is busy", code="overloaded")
    return error


def _unobserved(outputs: Sequence[Output], now: float) -> None:
    """Nobody measures."""


def _ignore(change: Phase | Stage) -> None:
    """Nobody listens."""
