"""What the terminal commands share."""

import argparse
import io
import sys

import pytest

from jaxinfer import console
from jaxinfer.request import SamplingParams


class Terminal(io.StringIO):
    def isatty(self):
        return True


def parse(*arguments):
    parser = argparse.ArgumentParser()
    console.add_sampling_arguments(parser)
    return console.sampling_of(parser.parse_args(arguments))


def test_only_given_flags_are_reported():
    assert parse() == {}
    given = parse("--max-tokens", "2k", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos")
    assert given == {"max_tokens": 2048, "temperature": 0.0, "stop": ["a", "b"], "ignore_eos": True}


def test_every_flag_is_a_sampling_field():
    values = {"list": ["x"], "switch": True}
    SamplingParams.of(**{flag.name: values.get(flag.kind, 1) for flag in console.SAMPLING_FLAGS})


def test_a_bad_count_says_what_to_write(capsys):
    with pytest.raises(SystemExit):
        parse("--max-tokens", "many")
    assert "'many' is not a count; write for example 4096, 4k or 1M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bench load --api-key abc --rate 3", "bench load --api-key *** --rate 3"),
        ("HF_TOKEN=hf_x  JAX_PLATFORMS=cpu", "HF_TOKEN=***  JAX_PLATFORMS=cpu"),
        ("MY_PASSWORD=x", "MY_PASSWORD=***"),
        ("get https://user:pw@host/x", "get https://***@host/x"),
        ("--max-tokens 40 --kv-tokens 4k monkey business", "--max-tokens 40 --kv-tokens 4k monkey business"),
    ],
)
def test_secrets_are_redacted(text, shown):
    assert console.redact(text) == shown


def test_tables_are_not_folded_in_a_pipe_and_nothing_is_markup(capsys):
    console.print_table("[red]model", [["", "a" * 40, "b" * 40], ["figure", "[bold]1", "2"]])
    out, err = capsys.readouterr()
    assert err == "" and "[red]model" in out and "[bold]1" in out and f"{'a' * 40}" in out and f"{'b' * 40}" in out


def test_bar_and_remarks_are_for_terminals_only(monkeypatch, capsys):
    with console.StageBar() as bar:
        bar("read", 1, 2)
    console.remark("aside")
    assert capsys.readouterr() == ("", "")
    console.warn("look")
    assert capsys.readouterr() == ("", "jaxinfer: look\n")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.StageBar() as bar:
        bar("read", 0, 2)
        bar("compile", 3, 13)
        bar("read", 2, 2)
    console.remark("aside [not markup]")
    shown = sys.stderr.getvalue()
    assert "compile" in shown and "3/13" in shown and "aside [not markup]" in shown
