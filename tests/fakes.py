"""Stand-ins for tests of everything above the engine: a byte-level tokenizer, an engine that needs no model, and a live server.

`FakeEngine` implements the engine's interface in plain Python: it answers each prompt with the prompt's own tokens (choice i begins i
tokens later), one per step, then stops. It obeys limits, stop rules and aborts, can be slow, hang, fail and crash on demand, and counts
like the real one, so what the doors do with it is what they do with a model.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.config import ServerConfig
from jaxinfer.engine.grammar import Grammars
from jaxinfer.engine.metrics import EngineMetrics, StepRecord
from jaxinfer.engine.text import OutputText
from jaxinfer.request import FinishReason, Output, QueueFull, Request, RequestError, TokenLogprob
from jaxinfer.serve.context import Context
from jaxinfer.serve.loop import EngineLoop, Progress
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.server import Server, bind
from jaxinfer.serve.shadow import Shadow
from jaxinfer.tokenizer import Tokenizer

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<|{{ m.role }}|>{{ prefix | default('') }}{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte and a few special ones, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    return Tokenizer(core, settings)


@dataclass(frozen=True)
class FakeInfo:
    """The fields of `EngineInfo`."""

    model: str = "fake"
    architecture: str = "echo"
    parameters: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    device_count: int = 1
    mesh: str = "data=1,tensor=1"
    max_model_len: int = 256
    kv_dtype: str = "float32"
    kv_tokens: int = 4096
    max_concurrency: int = 16
    programs: int = 1
    weight_bytes: int = 0
    program_bytes: int = 0
    kv_bytes: int = 0


@dataclass
class _Running:
    request: Request
    text: OutputText
    limit: int
    counted: bool
    made: int = 0


@dataclass
class FakeEngine:
    """Echoes prompts. step_seconds: how long a step takes. crash: the next step raises. hang: the next step waits for `release`.

    A prompt that holds the text `ERROR` ends with an error after one token; one with `REFUSE` is not taken; one with `BROKEN` makes
    `add` fail in an unforeseen way.
    """

    info: FakeInfo = FakeInfo()
    step_seconds: float = 0.0
    queue_limit: int = 4096
    crash: bool = False
    hang: bool = False
    hanging: bool = False
    defaults: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.5})
    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    metrics: EngineMetrics = field(default_factory=lambda: EngineMetrics(compile_seconds={"t16": 0.5}))
    aborted: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    closed: bool = False
    speculator: Any = None

    def __post_init__(self) -> None:
        self.grammars = Grammars(self.tokenizer, self.tokenizer.vocab_size)
        self._running: dict[tuple[str, int], _Running] = {}
        self._pending: deque[Output] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._running or self._pending)

    def add(self, request: Request, *, counted: bool = True) -> None:
        """Take one sequence."""
        text = self.tokenizer.decode(request.prompt)
        if "REFUSE" in text:
            raise RequestError("the engine does not take this prompt", "prompt")
        if "BROKEN" in text:
            raise KeyError("/secret/path/of/the/server")
        if len(self._running) >= self.queue_limit:
            raise QueueFull(f"{len(self._running)} requests are waiting already")
        limit = request.params.max_tokens or self.info.max_model_len - len(request.prompt)
        detokenizer = self.tokenizer.stream(skip_special=request.params.skip_special_tokens)
        self._running[request.key] = _Running(request, OutputText(detokenizer, request.params.stop), limit, counted)
        self.seen.append(request)
        self.metrics.prompt_tokens += len(request.prompt) * counted

    def abort(self, request_id: str) -> None:
        """End every sequence of that id."""
        self.aborted.append(request_id)
        for key in [key for key in self._running if key[0] == request_id]:
            running = self._running.pop(key)
            self._pending.append(self._last(running, FinishReason.ABORT))

    def step(self) -> list[Output]:
        """One token for every sequence."""
        if self.hang:
            self.hanging = True
            self.release.wait()
            self.hanging = False
        if self.crash:
            raise RuntimeError("planted: /secret/path")
        time.sleep(self.step_seconds)
        outputs = list(self._pending)
        self._pending.clear()
        outputs += [self._advance(running) for running in list(self._running.values())]
        count = len(self._running)
        self.metrics.record(StepRecord("decode", self.step_seconds, 0.0, count, 16))
        self.metrics.running = sum(running.counted for running in self._running.values())
        return outputs

    def shutdown(self) -> None:
        """Nothing may follow."""
        self.grammars.close()
        self.closed = True

    def _advance(self, running: _Running) -> Output:
        prompt, params = running.request.prompt, running.request.params
        if running.made == 1 and "ERROR" in self.tokenizer.decode(prompt):
            return self._last(running, FinishReason.ERROR, error="planted error in this row")
        ended = running.made >= len(prompt) and not params.stop.ignore_eos and running.made >= params.min_tokens
        token = self.tokenizer.eos_ids[0] if ended else prompt[(running.made + running.request.index) % len(prompt)]
        stopped = ended or token in params.stop.token_ids
        running.made += 1
        self.metrics.generation_tokens += running.counted
        piece = running.text.flush() if stopped else running.text.push(token, may_stop=running.made > params.min_tokens)
        text, stopped_by = piece.text, piece.stopped_by
        reason = FinishReason.STOP if stopped or stopped_by else FinishReason.LENGTH if running.made >= running.limit else None
        if reason is FinishReason.LENGTH:
            text += running.text.flush().text
        top = tuple((token + i if token + i < 256 else i, -0.5 - i) for i in range(params.logprobs or 0))
        logprobs = (TokenLogprob(token, -0.5, top),) if params.logprobs is not None else ()
        stop_reason = stopped_by or (token if token in params.stop.token_ids else None)
        scored = _scored(prompt, params.prompt_logprobs) if running.made == 1 else ()
        values = {"logprobs": logprobs, "prompt_logprobs": scored, "finish_reason": reason, "stop_reason": stop_reason}
        output = self._output(running, text=text, token_ids=(token,), **values)
        if reason is not None:
            self._forget(running, reason)
        return output

    def _output(self, running: _Running, **values: Any) -> Output:
        request = running.request
        return Output(request.id, request.index, prompt_tokens=len(request.prompt), output_tokens=running.made, **values)

    def _last(self, running: _Running, reason: FinishReason, error: str | None = None) -> Output:
        self._forget(running, reason)
        return self._output(running, finish_reason=reason, error=error)

    def _forget(self, running: _Running, reason: FinishReason) -> None:
        self._running.pop(running.request.key, None)
        self.metrics.finished[reason.value] += running.counted
        self.metrics.running = sum(each.counted for each in self._running.values())

    @property
    def running(self) -> int:
        """Sequences that hold anything."""
        return len(self._running)


def _scored(prompt: tuple[int, ...], count: int | None) -> tuple[TokenLogprob | None, ...]:
    """The prompt's logprobs: each token is the third most likely one, after its two successors."""
    if count is None:
        return ()
    top = [((token + 1) % 256, -0.25) for token in prompt], [((token + 2) % 256, -0.5) for token in prompt]
    rest = [TokenLogprob(token, -1.5, tuple(zip(*top, strict=True))[i][:count], 3) for i, token in enumerate(prompt)]
    return (None, *rest[1:])


class LiveServer:
    """A real uvicorn server on a free port of 127.0.0.1, in a thread; a context manager. Without `make` its engine is `fake`."""

    def __init__(self, make: Callable[[Progress], Any] | None = None, *, stall_seconds: float = 8.0, **settings: Any) -> None:
        self.fake = FakeEngine()
        config = ServerConfig(port=0, **settings)
        listening = bind(config.host, 0)
        self.loop = EngineLoop(make or (lambda progress: self.fake), stall_seconds=stall_seconds, shadow=Shadow(config.shadow_check))
        metrics = Metrics(lambda: self.loop.loaded, config.served_model_name)
        self.loop.observer = metrics.observe
        self.context = Context(config, self.loop, metrics)
        self.server = Server(self.context, listening)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.loop.start()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="server", daemon=True)
        self._thread.start()
        until(lambda: self.server.started)

    def _run(self, listening: Any) -> None:
        self.server.run(sockets=[listening])

    def client(self, **options: Any) -> httpx2.Client:
        """A plain HTTP client of this server."""
        return httpx2.Client(base_url=self.url, timeout=20, **options)

    def close(self) -> None:
        """End the server and its engine."""
        self.fake.release.set()
        self.server.should_exit = True
        self._thread.join(10)
        self.loop.stop()

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for something to become true.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.005)


def events(text: str) -> Iterator[str]:
    """The data of each server-sent event, comments left out."""
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            yield block.removeprefix("data: ")
