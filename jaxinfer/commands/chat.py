"""`jaxinfer chat`: talk with a model in the terminal, answers as they come.

With stdin from a pipe every line is a message and stdout carries the answers alone. The conversation is kept here and sent whole each
time; when it outgrows the context, its oldest messages are dropped. Ctrl-C during an answer stops it after the step in progress (the
engine is never interrupted inside one) and keeps what was said.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, add_sampling_arguments, remark, sampling_of, warn
from jaxinfer.request import FinishReason, SamplingParams

HELP = "talk with a model in the terminal"
COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "set the system message (alone: remove it) and forget the conversation",
    "/help": "list these commands",
    "/exit": "leave (also Ctrl-D)",
}
ROOM_FOR_ANSWER = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Talk until the end of input or /exit."""
    SamplingParams.of(**sampling_of(args))

    from jaxinfer.api import LLM

    with StageBar() as bar:
        llm = LLM.build(from_arguments(EngineConfig, vars(args)), progress=bar)
    with llm:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise ConfigError(f"{llm.engine.info.model} has no chat template; use `jaxinfer generate`, or a model made for chat")
        info = llm.engine.info
        remark(f"{info.model} on {info.device}, {info.dtype}, context {info.max_model_len} tokens.")
        remark("/help lists commands, Ctrl-C stops an answer.")
        talk(Conversation(llm, sampling_of(args), args.system))
    return 0


def talk(conversation: Conversation) -> None:
    """Read messages and commands until the end of input or /exit."""
    for line in _lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/help":
            remark("\n".join(f"{name:8} {help}" for name, help in COMMANDS.items()))
        elif command == "/reset":
            conversation.reset(conversation.system)
        elif command == "/system":
            conversation.reset(rest.strip() or None)
        elif command.startswith("/") and command[1:].isalpha():
            remark(f"unknown command {command}; there are {', '.join(COMMANDS)}")
        elif line.strip():
            _answer(conversation, line.strip())


class Conversation:
    """The messages so far, and how answers are sampled."""

    def __init__(self, llm: Any, sampling: dict[str, Any], system: str | None = None) -> None:
        self.llm = llm
        self.sampling = sampling
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget what was said and set the system message."""
        self.system = system
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def tokens(self) -> int:
        """Length of the conversation as the model will read it."""
        return len(self.llm.tokenizer.encode(self.llm.tokenizer.render_chat(self.messages), special=False))

    def make_room(self) -> int:
        """Drop the oldest exchanges until an answer fits; returns how many messages went."""
        first, dropped = int(self.system is not None), 0
        while self.tokens() + ROOM_FOR_ANSWER > self.llm.engine.info.max_model_len and len(self.messages) > first + 1:
            gone = min(2, len(self.messages) - first - 1)
            del self.messages[first : first + gone]
            dropped += gone
        return dropped

    def ask(self, text: str) -> Generator[Any]:
        """Add a message, yield the answer's deltas, and remember what was said even if the listener stops early."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            dropped = self.make_room()
            if dropped:
                remark(f"[the context is full: the oldest {dropped} messages are forgotten]")
            with closing(self.llm.stream(self.messages, **self.sampling)) as outputs:
                for output in outputs:
                    said.append(output.text)
                    yield output
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()


def _answer(conversation: Conversation, text: str) -> None:
    start, last, stopped = time.perf_counter(), None, False
    with _interrupts() as interrupted, closing(conversation.ask(text)) as outputs:
        try:
            for last in outputs:
                print(last.text, end="", flush=True)
                stopped = bool(interrupted)
                if stopped:
                    break
        except ValueError as error:  # too long, refused by the template: the conversation goes on
            warn(str(error))
            return
    print(flush=True)
    if last is None:
        return
    if last.finish_reason is FinishReason.ERROR:
        warn(str(last.error))
    speed = last.output_tokens / max(time.perf_counter() - start, 1e-9)
    ending = "stopped, " if stopped else "cut by the length limit, " if last.finish_reason is FinishReason.LENGTH else ""
    remark(f"[{ending}{last.output_tokens} tokens, {speed:.0f} tokens/s, context {last.prompt_tokens + last.output_tokens}]")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Within the block Ctrl-C is noted in the list instead of being raised; a second one is raised."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nobody to interrupt
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """The user's lines; edited with readline in a terminal, never with a prompt in redirected output."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
