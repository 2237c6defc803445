"""`jaxinfer chat` over an engine that echoes: the fake's answer is the rendered conversation itself, special tokens left out."""

import io
import signal
import sys
import threading

import pytest

from jaxinfer import __main__ as program
from jaxinfer.api import LLM
from jaxinfer.commands import chat
from tests.fakes import FakeEngine, FakeInfo


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()
    monkeypatch.setattr(LLM, "build", lambda config, *, progress=None: LLM.over(fake))
    return fake


def run(monkeypatch, capsys, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = program.main(["chat", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_piped_lines_are_messages_and_stdout_the_answers(engine, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "hi\n\nyou\n") == (0, "hi\nhihiyou\n", "")
    assert engine.closed


def test_commands(engine, monkeypatch, capsys):
    text = "one\n/reset\ntwo\n/system be kind\nthree\n/reset\nfour\n/system\nfive\n/help\n/exit\nnever\n"
    assert run(monkeypatch, capsys, text) == (0, "one\ntwo\nbe kindthree\nbe kindfour\nfive\n", "")


def test_unknown_commands_and_paths(engine, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "/nope\n/usr/bin is a path\n")[1] == "/usr/bin is a path\n"


def test_system_flag_and_sampling(engine, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "hi\n", "--system", "S", "--max-tokens", "5")[1] == "Sh\n"
    assert engine.seen[0].params.max_tokens == 5


def test_the_conversation_goes_on_after_a_refusal_or_an_error(engine, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "refuse me\nhi\nERROR\n")
    assert code == 0 and out.startswith("hi\n")
    assert err == "jaxinfer: the chat template refuses these messages: no such talk\njaxinfer: planted error in this row\n"


def test_oldest_messages_go_when_the_context_is_full():
    talk = chat.Conversation(LLM.over(FakeEngine(info=FakeInfo(max_model_len=64))), {"max_tokens": 4}, "S")
    for number in range(6):
        list(talk.ask(f"message {number}"))
    assert talk.tokens() <= 64 and talk.messages[0]["role"] == "system" and talk.messages[1]["role"] == "user"
    assert talk.messages[-2]["content"] == "message 5"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(engine, capsys):
    talk = chat.Conversation(LLM.over(engine), {})
    engine.step_seconds = 0.01
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.08, signal.raise_signal, [signal.SIGINT])
    timer.start()
    chat._answer(talk, "x" * 200)
    said = capsys.readouterr().out.removesuffix("\n")
    assert 0 < len(said) < 200 and talk.messages[-1] == {"role": "assistant", "content": said}
    assert engine.running == 0 and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_ends_it():
    with pytest.raises(KeyboardInterrupt), chat._interrupts() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_is_caught():
    seen = []

    def work():
        with chat._interrupts() as noted:
            seen.append(noted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_a_model_without_a_template_is_refused(engine, monkeypatch, capsys):
    engine.tokenizer.chat_template = None
    assert run(monkeypatch, capsys, "hi\n")[0::2] == (
        2, "jaxinfer: error: fake has no chat template; use `jaxinfer generate`, or a model made for chat\n"
    )  # fmt: skip


def test_terminal_lines_are_edited(monkeypatch, capsys):
    lines = iter(["typed"])

    def answer(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    assert list(chat._lines()) == ["typed"]
