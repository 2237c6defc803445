"""The engine without a network: `generate()` for one call, `LLM` to keep a model, `LLM.stream` for text as it comes.

A prompt (text, token ids or chat messages) becomes a `Request`; requests go to the engine through a `Desk`, which lets threads and
open streams share it; the deltas that come back are put together to `Completion`s, in the order in which the prompts were given.
Everything is synchronous, so it works under a running event loop (notebooks) as well. This file does not know how requests are
scheduled or what a step computes.
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.config import ConfigError, EngineConfig, MeshShape, engine_settings, from_arguments
from jaxinfer.engine.engine import Engine, Progress
from jaxinfer.request import FinishReason, Output, QueueFull, Request, RequestError, SamplingParams, TokenLogprob, choices

Prompt = str | Sequence[int] | np.ndarray
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Completion:
    """One finished sequence. `index` says which of a prompt's `n` choices it is; `error` is set when `finish_reason` is "error"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    prompt_tokens: int
    index: int = 0
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


Completions = Completion | list[Completion]


class Desk:
    """Lets threads and open streams share one engine: whoever waits for tokens drives a step; what it yields goes to its owner's box."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._boxes: dict[str, deque[Output]] = {}

    def outputs(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Hand in requests (each with n = 1), as fast as the engine takes them, and yield their deltas until all are done.

        A caller that stops listening aborts what is still running.

        Raises:
            RequestError: the engine refuses one of them; the others are aborted.
        """
        waiting, box, running = deque(requests), deque[Output](), set[tuple[str, int]]()
        try:
            while waiting or running:
                with self._lock:
                    self._hand_in(waiting, box, running)
                    if not box:
                        self._step()
                    ready = [box.popleft() for _ in range(len(box))]
                running -= {(output.request_id, output.index) for output in ready if output.finish_reason is not None}
                yield from ready
        finally:
            self._forget(box, {identity for identity, _ in running})

    def close(self) -> None:
        """Shut the engine down once the step in progress is over."""
        with self._lock:
            self._engine.shutdown()

    def _hand_in(self, waiting: deque[Request], box: deque[Output], running: set[tuple[str, int]]) -> None:
        while waiting:
            self._boxes[waiting[0].id] = box
            try:
                self._engine.add(waiting[0])
            except QueueFull:
                if not self._engine.has_work:
                    raise
                return
            running.add(waiting.popleft().key)

    def _step(self) -> None:
        if not self._engine.has_work:
            raise RuntimeError("the engine is idle although a request has not ended")
        for output in self._engine.step():
            if output.request_id in self._boxes:
                self._boxes[output.request_id].append(output)

    def _forget(self, box: deque[Output], unfinished: set[str]) -> None:
        with self._lock:
            self._boxes = {identity: other for identity, other in self._boxes.items() if other is not box}
            for identity in unfinished:
                self._engine.abort(identity)


class LLM:
    """A model, loaded and compiled, ready to generate; also a context manager.

    model: a folder, a Hugging Face repository or "demo". settings: any field of the engine's settings by its name (`dtype`, `mesh`,
    `max_model_len`, `page_size`, ...); counts and meshes may be written as on the command line ("4k", "tensor=4").

    Raises:
        ConfigError: an unknown setting or one that cannot work. CheckpointError, TokenizerError: a model that cannot be read.
    """

    def __init__(self, model: str = "demo", *, progress: Progress | None = None, **settings: Any) -> None:
        self._enter(Engine(engine_config(model=model, **settings), progress=progress))

    @classmethod
    def build(cls, config: EngineConfig, *, progress: Progress | None = None) -> LLM:
        """Load and compile the model that settings describe; raises as the constructor does."""
        return cls.over(Engine(config, progress=progress))

    @classmethod
    def over(cls, engine: Any) -> LLM:
        """Use an engine that exists already, an `Engine` or what behaves like one."""
        llm = cls.__new__(cls)
        llm._enter(engine)
        return llm

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling: Any) -> Completions:
        """Complete one prompt (text or token ids) or a list of them, all in one batch, with `params` or with flat names
        (`max_tokens=40, temperature=0, stop="\\n", grammar=Grammar.json_schema({...})`) over the model's own defaults.

        Returns one `Completion` for one prompt with n = 1, otherwise a list: prompts in order, each with its n choices in order.

        Raises:
            RequestError: a bad value, or a prompt that does not fit.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and _is_token(prompts[0]))
        return self._run_all([prompts] if single else prompts, params, sampling, single)

    def chat(self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None, **sampling: Any) -> Completions:
        """Answer one conversation (a list of {"role", "content"}) or a list of conversations; otherwise like `generate`."""
        single = len(messages) > 0 and isinstance(messages[0], Mapping)
        return self._run_all([messages] if single else messages, params, sampling, single)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None, **sampling: Any) -> Iterator[Output]:
        """Complete one prompt or answer one conversation and yield each delta (`text`, `token_ids`, `logprobs`, `index`) as it comes.

        Closing the iterator, or dropping it, aborts the request.
        """
        return self._desk.outputs(choices(self.request(prompt, params, **sampling)))

    def request(self, prompt: Prompt | Messages, params: SamplingParams | None = None, **sampling: Any) -> Request:
        """Encode a prompt or a conversation and settle how it is sampled; for `complete`.

        Raises:
            RequestError: a value or a grammar that cannot be used. TokenizerError: the chat template fails, or there is none.
        """
        if params is not None and sampling:
            raise RequestError(f"give params or {', '.join(sampling)}, not both", "params")
        if params is None:
            params = SamplingParams.of(**{**self.engine.defaults, **sampling})
        if params.grammar is not None:
            self.engine.grammars.compile(params.grammar)
        return Request(id=f"local-{next(self._ids)}", prompt=tuple(self._encode(prompt)), params=params)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run requests in one batch and yield a `Completion` for each choice, in order, as soon as it and those before it are done."""
        singles = [single for request in requests for single in choices(request)]
        parts = {single.key: _Draft() for single in singles}
        order = deque(parts)
        for output in self._desk.outputs(singles):
            parts[output.request_id, output.index].add(output)
            while order and parts[order[0]].finish_reason is not None:
                key = order.popleft()
                yield parts.pop(key).completion(index=key[1])

    def close(self) -> None:
        """Free the model; any use afterwards is an error."""
        self._desk.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, engine: Any) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self._desk = Desk(engine)
        self._ids = itertools.count()

    def _run_all(self, prompts: Any, params: SamplingParams | None, sampling: dict[str, Any], single: bool) -> Completions:
        completions = list(self.complete(self.request(prompt, params, **sampling) for prompt in prompts))
        return completions[0] if single and len(completions) == 1 else completions

    def _encode(self, prompt: Any) -> Sequence[int]:
        talk = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if (talk or isinstance(prompt, str)) and self.tokenizer is None:
            raise RequestError("this model has no tokenizer (random weights); give token ids", "prompt")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if talk:
            return self.tokenizer.encode(self.tokenizer.render_chat([dict(message) for message in prompt]), special=False)
        if not all(_is_token(token) for token in prompt):
            raise RequestError("a prompt is text, a list of token ids, or a list of chat messages", "prompt")
        return [int(token) for token in prompt]


def generate(
    prompts: Prompt | Sequence[Prompt], *, model: str = "demo", mesh: Any = None, dtype: str = "auto", **sampling: Any
) -> Completions:
    """Complete one prompt or a list of them; the engine is kept, so that the next call with the same model starts at once.

    `sampling` takes OpenAI's names (`max_tokens`, `temperature`, `top_p`, `seed`, `stop`, `n`, `logprobs`, ...). Other settings of the
    engine belong to `LLM`. Returns and raises as `LLM` and `LLM.generate` do.
    """
    misplaced = sorted(engine_settings().keys() & sampling.keys())
    if misplaced:
        raise ConfigError(f"{misplaced[0]} is a setting of the engine: use LLM({misplaced[0]}=...).generate(...)")
    config = engine_config(model=model, dtype=dtype, **({} if mesh is None else {"mesh": mesh}))
    return _KEPT.get(config).generate(prompts, **sampling)


def engine_config(**settings: Any) -> EngineConfig:
    """Build the engine's settings from flat names; text is read as the command line would read it.

    Raises:
        ConfigError: an unknown name (the nearest is named), a value of the wrong type or out of range.
    """
    known = engine_settings()
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {name!r}{hint}")
    return from_arguments(EngineConfig, {name: _read(name, known[name], value) for name, value in settings.items() if value is not None})


@dataclass
class _Draft:
    """A sequence while its deltas arrive."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    prompt_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    def add(self, output: Output) -> None:
        self.text.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs)
        self.prompt_logprobs += output.prompt_logprobs
        self.prompt_tokens = output.prompt_tokens
        self.finish_reason, self.error = output.finish_reason, output.error

    def completion(self, index: int) -> Completion:
        reason = FinishReason(self.finish_reason or FinishReason.ERROR)
        return Completion(
            "".join(self.text), tuple(self.token_ids), reason, tuple(self.logprobs), self.prompt_tokens, index, self.error,
            prompt_logprobs=self.prompt_logprobs,
        )  # fmt: skip


class _KeptEngine:
    """The engine that `generate` used last. Another one is built only after it is let go, since two may not fit on the device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._config: EngineConfig | None = None
        self._llm: LLM | None = None

    def get(self, config: EngineConfig) -> LLM:
        with self._lock:
            if self._llm is None or self._config != config:
                self._llm = None
                self._llm, self._config = LLM.build(config), config
            return self._llm


_KEPT = _KeptEngine()


def _read(name: str, item: Any, value: Any) -> Any:
    if isinstance(value, str) and item.metadata["parse"] is not None:
        return item.metadata["parse"](value)
    if isinstance(value, Mapping) and name == "mesh":
        if not set(value) <= set(MeshShape._fields):
            raise ConfigError(f"mesh {dict(value)}: the axes are {' and '.join(MeshShape._fields)}")
        return MeshShape(**value)
    kind = str(item.type).removesuffix(" | None")
    accepted = {"int": int, "float": (int, float), "str": str, "MeshShape": MeshShape}[kind]
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ConfigError(f"{name} must be {kind}, got {type(value).__name__}")
    return value


def _is_token(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
