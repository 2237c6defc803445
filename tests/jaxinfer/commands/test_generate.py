"""`jaxinfer generate` over an engine that echoes its prompts."""

import io
import json
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.api import LLM
from jaxinfer.grammar import Grammar
from tests.fakes import FakeEngine


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()
    monkeypatch.setattr(LLM, "build", lambda config, *, progress=None: LLM.over(fake))
    return fake


def run(capsys, *arguments):
    code = program.main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text_alone_is_on_stdout(engine, capsys):
    assert run(capsys, "--prompt", "hello there", "--max-tokens", "5", "--temperature", "0") == (0, "hello\n", "")
    assert engine.seen[0].params.temperature == 0 and engine.closed


def test_several_completions_get_headings(engine, capsys):
    code, out, _ = run(capsys, "--prompt", "ab", "--prompt", "c", "--n", "2")
    assert code == 0 and out == "==> 0 <==\nab\n==> 0, choice 1 <==\nba\n==> 1 <==\nc\n==> 1, choice 1 <==\nc\n"


def test_json_has_everything(engine, capsys):
    code, out, _ = run(capsys, "--prompt", "ab", "--json", "--logprobs", "1", "--stop", "b")
    record = json.loads(out)
    assert code == 0 and record.pop("logprobs")[0] == {"token": "a", "logprob": -0.5, "top": [{"token": "a", "logprob": -0.5}]}
    usage = {"prompt_tokens": 2, "output_tokens": 2, "finish_reason": "stop", "token_ids": [64, 65]}
    assert record == {"id": 0, "prompt": "ab", "index": 0, "text": "a", **usage}


def test_stream(engine, capsys):
    assert run(capsys, "--prompt", "héllo", "--stream")[1] == "héllo\n"
    lines = [json.loads(line) for line in run(capsys, "--prompt", "ab", "--stream", "--json", "--n", "2")[1].splitlines()]
    assert [line["text"] for line in lines if line["index"] == 1] == ["b", "a", ""]
    assert lines[-1]["finish_reason"] == "stop"


def test_json_lines_carry_their_own_fields(engine, capsys, tmp_path):
    rows = ["plain", {"prompt": "own", "max_tokens": 1, "id": "x"}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    code, out, _ = run(capsys, "--input", str(tmp_path / "in.jsonl"), "--json", "--max-tokens", "3", "--prompt", "first")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(row["id"], row["text"]) for row in found[:3]] == [(0, "fir"), (1, "pla"), ("x", "o")]
    assert found[3]["messages"] == rows[2]["messages"]


def test_stdin_is_one_prompt_or_json_lines(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\nc\n"))
    assert run(capsys)[1] == "a b\nc\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO('"x"\n'))
    assert run(capsys, "--input", "-")[1] == "x\n"


def test_grammars(engine, capsys, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "null"}')
    assert run(capsys, "--prompt", "a", "--json-schema", str(schema))[0] == 0
    assert engine.seen[-1].params.grammar == Grammar.json_schema({"type": "null"})
    assert run(capsys, "--prompt", "a", "--regex", "[a-z]")[0] == 0
    assert engine.seen[-1].params.grammar == Grammar.regex("[a-z]")
    for flags, words in ((["--regex", "(a"], "unclosed"), (["--json-schema", "nowhere.json"], "No such file")):
        code, _, err = run(capsys, "--prompt", "a", *flags)
        assert code == 2 and words in err


def test_chat_wraps_prompts_in_the_template(engine, capsys):
    run(capsys, "--prompt", "hi", "--chat")
    assert engine.tokenizer.decode(engine.seen[0].prompt, skip_special=False) == "<|user|>hi<|eos|><|assistant|>"


def test_a_failed_sequence_makes_the_code_1(engine, capsys):
    for flags in ([], ["--stream"]):
        code, _, err = run(capsys, "--prompt", "ERROR", *flags)
        assert (code, err) == (1, "jaxinfer: prompt 0: planted error in this row\n")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", (), "there is no prompt; give --prompt TEXT or --input FILE"),
        ("{", ("--input", "-"), "--input -, line 1: not JSON ("),
        ("3", ("--input", "-"), 'prompt 0: give a string, {"prompt": ...} or {"messages": [...]}'),
        ('{"prompt": "x", "tempo": 1}', ("--input", "-"), "unknown sampling field 'tempo'"),
        ("", ("--input", "no/such/file"), "--input no/such/file: No such file or directory"),
        ("", ("--prompt", "a", "--prompt", "b", "--stream"), "--stream prints one completion"),
        ("", ("--prompt", "a", "--n", "2", "--stream"), "--stream prints one completion"),
        ("", ("--prompt", "REFUSE"), "the engine does not take this prompt"),
    ],
)
def test_bad_input_is_one_line(engine, capsys, monkeypatch, content, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith(f"jaxinfer: error: {message}") and err.count("\n") == 1


def test_a_person_is_asked_for_a_prompt(engine, capsys, monkeypatch):
    stdin = io.StringIO("typed\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(capsys)[1:] == ("typed\n", "type a prompt, then Ctrl-D:\n")
