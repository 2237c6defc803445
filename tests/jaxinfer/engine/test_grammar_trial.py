"""The process that tries grammars: answers, is killed in time, starts again."""

import gc
import os
import subprocess
import sys
import time

import pytest

from jaxinfer.engine import grammar_trial
from jaxinfer.engine.grammar_compile import tokenizer_of
from jaxinfer.engine.grammar_trial import Trial, problem_of
from jaxinfer.grammar import Grammar
from tests.fakes import byte_tokenizer

# An intersection with a complement: whether it is empty takes time exponential in the counts.
HOSTILE = Grammar.lark("start: A\nA: /(.*[ab].{30}.*)/ & /(.*[cd].{31}.*)/ & ~/(.*[ef].{25}.*)/")
CHAIN = Grammar.json_schema({"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1500)}})


def setup():
    tokenizer = byte_tokenizer()
    return {"text": tokenizer.to_json(), "eos": tokenizer.eos_ids, "vocab": tokenizer.vocab_size}


@pytest.fixture
def trial():
    trial = Trial(setup(), seconds=0.4)
    yield trial
    trial.close()


def alive(process):
    return process.poll() is None


def test_one_process_answers_until_it_is_killed_and_another_follows(trial):
    assert trial.problem(Grammar.regex("a+")) is None
    first = trial._process
    assert "unclosed" in trial.problem(Grammar.regex("(a"))
    assert "never ends" in trial.problem(Grammar.json_schema({"$ref": "#"}))
    assert trial._process is first
    begun = time.monotonic()
    assert "too complex" in trial.problem(HOSTILE)
    assert time.monotonic() - begun < 2 and not alive(first)
    assert trial.problem(Grammar.json_object()) is None
    second = trial._process
    second.kill()
    second.wait()
    assert trial.problem(Grammar.json_object()) is None, "one that died by itself is replaced"


def test_long_chains_of_references_do_not_hang(trial):
    begun = time.monotonic()
    trial.problem(CHAIN)
    assert time.monotonic() - begun < 2


def test_the_process_ends_with_its_owner():
    trial = Trial(setup())
    trial.problem(Grammar.regex("a"))
    process = trial._process
    del trial
    gc.collect()
    assert not alive(process)


def test_the_default_limit_is_two_seconds():
    assert grammar_trial.SECONDS == 2.0


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else sys.executable)
    with pytest.raises(RuntimeError, match="did not start"):
        Trial({"text": "{}", "eos": [], "vocab": 1}).problem(Grammar.regex("a"))


def test_an_orphan_ends_itself():
    """Nobody reads the answer of this one."""
    code = f"from {grammar_trial.__name__} import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    grammar_trial._tell(process.stdin, {**setup(), "seconds": -0.8})
    process.stdout.readline()
    grammar_trial._tell(process.stdin, {"kind": HOSTILE.kind, "text": HOSTILE.text})
    assert process.wait(10) != 0
    process.stdin.close()
    process.stdout.close()


def test_what_the_process_says_of_a_grammar():
    tokenizer = tokenizer_of(**setup())
    assert problem_of(Grammar.json_object(), tokenizer) is None
    assert "'#' never ends" in problem_of(Grammar.json_schema({"$ref": "#"}), tokenizer)
    assert "unclosed" in problem_of(Grammar.regex("("), tokenizer)
