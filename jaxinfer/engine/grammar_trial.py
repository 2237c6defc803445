"""Grammars are compiled first in a process of their own, which is killed if that takes too long: a hostile grammar cannot hang the server.

The process starts with the first grammar and stays; after a kill the next grammar starts a new one. Both sides talk in lines of JSON
over pipes: first the tokenizer, then one grammar at a time, each answered by its problem or null. `main` is the process's side.
This file does not know what a grammar means.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

from llguidance import LLTokenizer

from jaxinfer.engine.grammar_compile import GrammarProblem, compiled, endless, tokenizer_of
from jaxinfer.grammar import Grammar, GrammarKind

if sys.platform != "win32":
    import resource

SECONDS = 2.0
START_SECONDS = 60.0
MEMORY = 4 << 30


class Trial:
    """Says what is wrong with a grammar within bounded time. One thread at a time uses it; `close` ends the process.

    setup: keyword arguments of `grammar_compile.tokenizer_of`. seconds: the time a grammar may take.
    """

    def __init__(self, setup: dict[str, Any], *, seconds: float = SECONDS) -> None:
        self._setup = setup
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._kill: weakref.finalize[..., Trial] | None = None
        self._lock = threading.Lock()

    def problem(self, grammar: Grammar) -> str | None:
        """Why a grammar cannot be used; None if it can.

        Raises:
            RuntimeError: the process cannot be started.
        """
        with self._lock:
            process = self._running()
            answer = _ask(process, {"kind": grammar.kind, "text": grammar.text}, self._seconds)
            if answer is None:
                self._end()
                return f"it is too complex: compiling it takes over {self._seconds:g} seconds or too much memory; simplify it"
            return answer["problem"]

    def close(self) -> None:
        """End the process; a later grammar would start another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
        process = subprocess.Popen(  # noqa: S603  our own interpreter and code
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        self._process, self._kill = process, weakref.finalize(self, _kill, process)
        if _ask(process, {**self._setup, "seconds": self._seconds}, START_SECONDS) is None:
            self._end()
            raise RuntimeError("the process that tries grammars did not start")
        return process

    def _end(self) -> None:
        if self._kill is not None:
            self._kill()
        self._process = self._kill = None


def main() -> None:
    """The process's side: answer grammars until the input ends, within its own limits of time and memory where the system has them."""
    setup = json.loads(sys.stdin.readline())
    seconds = setup.pop("seconds")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process when it is done
    tokenizer = tokenizer_of(**setup)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _tell(sys.stdout, {})
    for line in sys.stdin:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)  # nobody else ends it if the server is gone
        _tell(sys.stdout, {"problem": problem_of(Grammar(**json.loads(line)), tokenizer)})
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def problem_of(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    """Why a grammar cannot be used; None if it can. Takes as long as it takes."""
    if grammar.kind is GrammarKind.JSON_SCHEMA and (reference := endless(json.loads(grammar.text))) is not None:
        return f"its reference {reference[:80]!r} never ends: every value that satisfies it would be infinite"
    try:
        compiled(grammar, tokenizer)
    except GrammarProblem as error:
        return str(error)
    return None


def _ask(process: subprocess.Popen[str], message: dict[str, Any], seconds: float) -> Any:
    """Send one line and read one; None if the process ended instead, which it does when the time is up."""
    source, target = process.stdout, process.stdin
    if source is None or target is None:
        return None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        _tell(target, message)
        line = source.readline()
    except OSError:
        return None
    finally:
        timer.cancel()
    return json.loads(line) if line.endswith("\n") else None


def _tell(target: Any, message: dict[str, Any]) -> None:
    target.write(json.dumps(message) + "\n")
    target.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not sent yet cannot be any more
                pipe.close()
