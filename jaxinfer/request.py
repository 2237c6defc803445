"""What a user asks for and what comes back: plain Python values that never reach jax.

A door (`api.py` or `serve/`) builds one `Request` for each sequence to be generated and the engine answers with a stream of
`Output` deltas that carry the request's id. Everything is checked here, when it is made, so that nothing behind the door
meets a bad value; only what needs the model to be checked (vocabulary size, context length) waits for `Engine.add`.
This file does not know how requests are scheduled, batched or sampled.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.grammar import Grammar

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 32
MAX_WORD_LENGTH = 64
MAX_ALLOWED_TOKENS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 16
MAX_PRIORITY = 2**31 - 1
MAX_TOKEN = 2**31 - 1
MAX_SALT = 256
SEED_BITS = 64


class QueueFull(RequestError):
    """Too many requests wait already; the caller should try again later."""


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a finite number, got {type(value).__name__}", name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:
        raise RequestError(f"{name} must be between {low:g} and {high:g}, got {number:g}", name)


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {type(value).__name__}", name)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        found = str(value) if abs(value) < 1 << SEED_BITS else "a number beyond 64 bits"  # Python prints only so many digits
        raise RequestError(f"{name} must be {bounds}, got {found}", name)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {type(value).__name__}", name)


def _listed(name: str, value: Any, most: int) -> tuple[Any, ...]:
    """A list of at most `most` entries as a tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"{name} must be a list, got {type(value).__name__}", name)
    if len(value) > most:
        raise RequestError(f"{name} has {len(value)} entries; at most {most} are supported", name)
    return tuple(value)


class FinishReason(StrEnum):
    """Why a sequence ended: a stop token or string, a length limit, an abort by the caller, or an error in its own row."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class StopRules:
    """Where a sequence ends: `strings` (removed from the text unless `include_in_output`), `token_ids`, and end-of-sequence
    tokens unless `ignore_eos`.

    Raises:
        RequestError: more than 16 strings, an empty string or one over 256 characters, more than 16 token ids.
    """

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    include_in_output: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if len(self.strings) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.strings)} strings; at most {MAX_STOP_STRINGS} are supported", "stop")
        for text in self.strings:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", "stop")
        if len(self.token_ids) > MAX_STOP_TOKENS:
            raise RequestError(f"stop_token_ids has {len(self.token_ids)} ids; at most {MAX_STOP_TOKENS} are supported", "stop_token_ids")
        for token in self.token_ids:
            _check_int("stop_token_ids", token, 0, None)
        _check_flag("include_stop_str_in_output", self.include_in_output)
        _check_flag("ignore_eos", self.ignore_eos)

    @classmethod
    def of(cls, value: object) -> StopRules:
        """Accept what users write: nothing, one string, a list of strings, or the rules themselves.

        Raises:
            RequestError: anything else.
        """
        if isinstance(value, StopRules):
            return value
        if value is None:
            return cls()
        if not isinstance(value, Sequence):
            raise RequestError(f"stop must be a string or a list of strings, got {type(value).__name__}", "stop")
        return cls(strings=(value,) if isinstance(value, str) else tuple(value))


@dataclass(frozen=True)
class Drawing:
    """How one token is drawn. Defaults are OpenAI's.

    temperature: 0 is greedy. top_k: 0 or -1 switches it off. seed: any 64-bit integer, or None for a fresh one.
    bad_words: texts that the output may not hold, within or between words. allowed_token_ids: the only ones that may be drawn, or None.

    Raises:
        RequestError: a value of the wrong type or out of range, naming the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be above 0; use temperature 0 for greedy decoding", "top_p")
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2 ** (SEED_BITS - 1)), 2 ** (SEED_BITS - 1) - 1)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        self._check_bias()
        self._check_words()
        self._check_allowed()

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {type(self.logit_bias).__name__}", "logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # a copy: the caller may change its own
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are supported", "logit_bias")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, None)
            _check_number("logit_bias", bias, -100.0, 100.0)

    def _check_words(self) -> None:
        words = _listed("bad_words", self.bad_words, MAX_BAD_WORDS)
        if not all(isinstance(word, str) and word.strip() and len(word) <= MAX_WORD_LENGTH for word in words):
            raise RequestError(f"each of bad_words must be a string of 1 to {MAX_WORD_LENGTH} characters, not blank", "bad_words")
        object.__setattr__(self, "bad_words", tuple(dict.fromkeys(words)))

    def _check_allowed(self) -> None:
        if self.allowed_token_ids is None:
            return
        tokens = _listed("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKENS)
        if not tokens:
            raise RequestError(
                "allowed_token_ids is empty, so nothing could be drawn; leave it out to allow every token", "allowed_token_ids"
            )
        for token in tokens:
            _check_int("allowed_token_ids", token, 0, None)
        object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(tokens)))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, so that the seed does not matter."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class SamplingParams(Drawing):
    """How tokens are drawn, what is reported about them and when to stop. `max_tokens=None` means up to the context length.

    logprobs: number of alternatives reported beside each sampled token (0 reports the token alone, None nothing).
    prompt_logprobs: the same for each token of the prompt but the first. n: number of independent sequences for one prompt.
    grammar: what the output must look like; it also decides where the output may end, so it excludes `min_tokens` and `ignore_eos`.

    Raises:
        RequestError: a value of the wrong type or out of range, naming the field.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: StopRules = StopRules()
    n: int = 1
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stop", StopRules.of(self.stop))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1 if self.max_tokens is None else self.max_tokens)
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_flag("skip_special_tokens", self.skip_special_tokens)
        self._check_grammar()

    def _check_grammar(self) -> None:
        if self.grammar is None:
            return
        if not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar must be a Grammar, such as Grammar.json_schema(...), got {type(self.grammar).__name__}", "grammar")
        for name, given in (("min_tokens", self.min_tokens > 0), ("ignore_eos", self.stop.ignore_eos)):
            if given:
                raise RequestError(f"{name} cannot be combined with a grammar, which decides where the output ends; leave it out", name)

    @classmethod
    def of(cls, **values: Any) -> SamplingParams:
        """Build from the flat names of OpenAI's API (`stop`, `stop_token_ids`, `ignore_eos`, `include_stop_str_in_output`, ...).

        Raises:
            RequestError: an unknown name, or any value that the class refuses.
        """
        rules = StopRules.of(values.pop("stop", None))
        renamed = {"stop_token_ids": "token_ids", "ignore_eos": "ignore_eos", "include_stop_str_in_output": "include_in_output"}
        given = {new: value for old, new in renamed.items() if (value := values.pop(old, None)) is not None}
        if "token_ids" in given:
            if not isinstance(given["token_ids"], Sequence) or isinstance(given["token_ids"], str):
                raise RequestError("stop_token_ids must be a list of token ids", "stop_token_ids")
            given["token_ids"] = tuple(given["token_ids"])
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(f"unknown sampling field {name!r}; known: {', '.join(sorted(known | set(renamed)))}", name)
        return cls(stop=replace(rules, **given), **values)


@dataclass(frozen=True)
class Request:
    """One sequence to generate: `prompt` token ids, how to sample, and which choice of its call it is (`index`).

    priority: smaller is more urgent. cache_salt: only requests with the same salt share cached prefixes. ids: the prompt again, packed as
    the engine copies, hashes and sends it.

    Raises:
        RequestError: an empty prompt, a token that is not a plain integer from 0 to 2**31 - 1, a salt that is no string or too long.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    index: int = 0
    priority: int = 0
    cache_salt: str = ""
    ids: array[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT:
            raise RequestError(f"cache_salt must be a string of at most {MAX_SALT} characters", "cache_salt")
        if set(map(type, self.prompt)) != {int} or min(self.prompt) < 0 or max(self.prompt) > MAX_TOKEN:  # a long one in one go
            for token in self.prompt:
                _check_int("prompt", token, 0, MAX_TOKEN)
        object.__setattr__(self, "ids", array("i", self.prompt))

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the sequence inside the engine."""
        return (self.id, self.index)


def choices(request: Request) -> list[Request]:
    """Split a request with `n` > 1 into its sequences; each seeded one gets a seed of its own (the first keeps the given one)."""
    params = request.params
    return [
        replace(request, index=i, params=replace(params, n=1, seed=params.seed if i == 0 else _derived_seed(params.seed, i)))
        for i in range(params.n)
    ]


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability under the unmodified model (nats), and the most likely alternatives in order.

    rank: how many tokens were at least as likely, itself included (tokens of a prompt alone).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Output:
    """What one step added to one sequence. `text` is new text that can no longer change; the last delta has a finish reason.

    prompt_logprobs: one entry for each token of the prompt, None for the first, in the first delta of a sequence that asked for them.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def joined(first: Output, second: Output) -> Output:
    """Two deltas of one sequence that follow each other, as one."""
    return replace(
        second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids, logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )  # fmt: skip


def _derived_seed(seed: int | None, index: int) -> int | None:
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little", signed=True)
