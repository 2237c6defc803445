"""Text to token ids and back, and conversations to text.

A folder's `tokenizer.json` is read by the `tokenizers` library; special tokens and the chat template come from
`tokenizer_config.json` (or `chat_template.jinja`), end-of-sequence ids also from `generation_config.json`. No code of the folder is
run: templates render in a sandbox. Text leaves through a `Detokenizer`, which holds back bytes that do not form a character yet.
This file does not know about requests, stop strings or the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

MAX_RENDERED = 16 << 20
MAX_EOS = 16
MAX_HELD = 64  # tokens without a whole character; then they count as text (or as skipped), since looking at all of them again takes time


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or a conversation its template refuses."""


class Tokenizer:
    """One model's vocabulary and chat template.

    Attributes: vocab_size (ids are below it), bos_id, pad_id (or None), eos_ids, chat_template (or None).
    """

    def __init__(self, core: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_ids: Sequence[int] = ()) -> None:
        self._core = core
        self._specials = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.vocab_size = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self._id(self._specials["bos_token"])
        self.pad_id = self._id(self._specials["pad_token"])
        own = self._id(self._specials["eos_token"])
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *([] if own is None else [own])]))
        self.chat_template = _template_text(settings.get("chat_template"))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a model folder.

        Raises:
            TokenizerError: `tokenizer.json` is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder.name} has no tokenizer.json; jaxinfer reads fast tokenizers only: save the model with one")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path.name} of {folder.name} cannot be read: {error}") from None
        core.no_padding()
        core.no_truncation()
        settings = _read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.is_file():
            settings["chat_template"] = _read_text(template)
        return cls(core, settings, _read_eos(folder))

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._core.token_to_id(text)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer itself adds (for example a begin-of-sequence token)."""
        return self._core.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        """Text of one token as it would stand inside a text; bytes that form no character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token (byte-level and byte-fallback vocabularies), for example b" the"."""
        raw = self._core.id_to_token(token)
        if raw is None:
            return b""
        if token in self._added:
            return raw.encode()
        if self._byte_level and all(character in self._byte_of for character in raw):
            return bytes(self._byte_of[character] for character in raw)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", raw):
            return bytes.fromhex(byte[1])
        return raw.replace("\u2581", " ").encode()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text: `decode` and streams leave them out unless told otherwise."""
        return frozenset(token for token, added in self._core.get_added_tokens_decoder().items() if added.special)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._core.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in self._core.to_str()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The printable stand-ins that byte-level BPE gives to bytes (Radford et al. 2019, GPT-2's encoder)."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}

    def special_text(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, `pad_token` or `unk_token`, None where the model has none."""
        return self._specials[name]

    def to_json(self) -> str:
        """The whole tokenizer as JSON (what structured output builds upon)."""
        return self._core.to_str()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Text of a conversation, ready for `encode(text, special=False)`.

        Raises:
            TokenizerError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("the model has no chat template; use plain completions, or a model made for chat")
        special = {name: text for name, text in self._specials.items() if text is not None}
        try:
            given = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
            text = _compiled(self.chat_template).render({**special, **variables, **given})
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from None
        except Exception:  # a template is a program: it can fail in any way
            raise TokenizerError("the chat template failed on these messages; check their roles and contents") from None
        if len(text) > MAX_RENDERED:
            raise TokenizerError(f"the rendered conversation has {len(text)} characters; at most {MAX_RENDERED} are supported")
        return text

    def stream(self, *, skip_special: bool) -> Detokenizer:
        """A fresh incremental detokeniser."""
        return Detokenizer(self._core, skip_special)


class Detokenizer:
    """Turns one sequence's tokens into text as they come; the pieces joined are the whole text."""

    def __init__(self, core: tokenizers.Tokenizer, skip_special: bool) -> None:
        self._core = core
        self._skip = skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._held: list[int] = []
        self._context: list[int] = []

    def push(self, token: int) -> str:
        """New text that can no longer change; empty while a character is incomplete."""
        self._held.append(token)
        try:
            text = self._stream.step(self._core, token)
        except Exception:  # the library's way to say that bytes turned out to form no character after some of them were handed out
            text = self._start_over(self._held)
        if text is not None:
            self._context = self._held
        elif len(self._held) >= MAX_HELD:
            text = self._start_over(self._context)
        else:
            return ""
        self._held = []
        return text

    def _start_over(self, context: list[int]) -> str:
        """The held tokens as they are; what follows is decoded behind `context`, which must not end inside a character."""
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        return self._core.decode(self._held, skip_special_tokens=self._skip)

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD; nothing may be pushed afterwards."""
        text = self._core.decode(self._held, skip_special_tokens=self._skip)
        self._held = []
        return text


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; while serving it is only its contents."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """Hugging Face's conventions for chat templates: trimmed blocks, loop controls, tojson without HTML escapes."""
    extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's filter, argument by argument: unlike Jinja's own it leaves HTML and other scripts as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"tokenizer_config.json: a special token is {type(text).__name__}; it must be text")
    return text


def _template_text(value: Any) -> str | None:
    if isinstance(value, list):  # several named templates: take the default one
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"tokenizer_config.json: chat_template is {type(value).__name__}; it must be text")
    return value


def _read_eos(folder: Path) -> list[int]:
    """End-of-sequence ids from generation_config.json, else from config.json."""
    found = (_read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    ids = next((value for value in found if value is not None), [])
    ids = ids if isinstance(ids, list) else [ids]
    if len(ids) > MAX_EOS or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise TokenizerError(f"{folder.name}: eos_token_id must be a token id or a list of at most {MAX_EOS}")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from None
