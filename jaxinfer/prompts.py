"""The user's own prompts: a file of JSON lines becomes documents of token ids, checked line by line.

A line is {"prompt": TEXT} or {"messages": [{"role", "content"}, ...]} (rendered by the model's chat template) and may have a
{"completion": TEXT}. Blank lines are passed over; anything else is an error that names its line. What is too long is not dropped in
silence: a completion is cut where the context ends and the cut tokens are counted; a prompt that leaves no room for one more token is
refused. Audits, calibration and distillation read the same files. This file reaches no jax and does not know what prompts are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.tokenizer import Tokenizer, TokenizerError

FIELDS = ("prompt", "messages", "completion")


@dataclass(frozen=True)
class Line:
    """One checked line of the file, not yet cut into tokens. Exactly one of prompt and messages is given."""

    number: int
    prompt: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    completion: str | None


@dataclass(frozen=True)
class Lines:
    """A file's lines, and the SHA-256 of its bytes: whoever has the file can tell that a result is of it. flag: what named the file."""

    name: str
    sha256: str
    lines: tuple[Line, ...]
    flag: str = "--data"

    def where(self, line: int) -> str:
        """How a message names a line."""
        return f"{self.flag} {self.name}, line {line}"


@dataclass(frozen=True)
class Document:
    """One prompt in tokens. `completion` holds what follows, empty where a model's own continuation will.

    prompt_text: as the model reads it. given: the line's completion or None. room: tokens that may follow the prompt. cut: tokens of
    the completion that did not fit.
    """

    line: int
    prompt_text: str
    given: str | None
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    room: int
    cut: int = 0


def read(path: Path, flag: str = "--data") -> Lines:
    """Read and check a file of JSON lines.

    Raises:
        ConfigError: a file that cannot be read or holds no prompt, or a bad line, with its number and what to write.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; name a file of JSON lines") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: not UTF-8 text") from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append(_line(number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{flag} {path}, line {number}: {_reason(error)}") from None
    if not lines:
        raise ConfigError(f'{flag} {path} holds no prompt; write lines like {{"prompt": "Once upon a time"}}')
    return Lines(path.name, hashlib.sha256(raw).hexdigest(), tuple(lines), flag)


def encode(lines: Lines, tokenizer: Tokenizer, longest: int) -> list[Document]:
    """Cut lines into tokens for a context of `longest` tokens.

    Raises:
        ConfigError: a prompt that leaves no room, or a conversation that the chat template refuses, with the line's number.
    """
    return [_document(line, tokenizer, longest, lines.where(line.number)) for line in lines.lines]


def _reason(error: Exception) -> str:
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)


def _line(number: int, value: object) -> Line:
    if not isinstance(value, dict):
        raise ConfigError(f'a JSON {type(value).__name__}; write an object like {{"prompt": "Once upon a time"}}')
    if unknown := sorted(value.keys() - set(FIELDS)):
        raise ConfigError(f"the name {unknown[0]!r} means nothing here; a line has {', '.join(FIELDS)}")
    if ("prompt" in value) == ("messages" in value):
        raise ConfigError('give either "prompt" or "messages"')
    for name in ("prompt", "completion"):
        if name in value and (not isinstance(value[name], str) or not value[name]):
            raise ConfigError(f"{name} must be text that is not empty")
    messages = _messages(value["messages"]) if "messages" in value else None
    return Line(number, value.get("prompt"), messages, value.get("completion"))


def _messages(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError("messages must be a list that is not empty")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ConfigError('each message must be an object with text in "role" and "content"')
    return tuple(value)


def _document(line: Line, tokenizer: Tokenizer, longest: int, where: str) -> Document:
    try:
        text = line.prompt if line.messages is None else tokenizer.render_chat([dict(message) for message in line.messages])
    except TokenizerError as error:
        raise ConfigError(f"{where}: {error}") from None
    text, special = text or "", line.messages is None
    prompt = tokenizer.encode(text, special=special)
    room = longest - len(prompt)
    if not prompt or room < 1:
        raise ConfigError(
            f"{where}: the prompt has {len(prompt)} tokens, but the context holds {longest}, what follows included;"
            " shorten it, leave it out, or raise --max-model-len"
        )
    completion = _continued(prompt, text, line.completion, tokenizer, special=special) if line.completion is not None else []
    if line.completion is not None and not completion:
        raise ConfigError(f"{where}: the completion has no token")
    return Document(
        line.number, text, line.completion, tuple(prompt), tuple(completion[:room]), room, cut=max(len(completion) - room, 0)
    )  # fmt: skip


def _continued(prompt: Sequence[int], text: str, completion: str, tokenizer: Tokenizer, *, special: bool) -> list[int]:
    """Tokens of the completion as they stand behind the prompt; cut apart from it where a token would span both."""
    whole = tokenizer.encode(text + completion, special=special)
    if list(prompt) == whole[: len(prompt)]:
        return whole[len(prompt) :]
    return tokenizer.encode(completion, special=False)
