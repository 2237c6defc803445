"""The benchmark of drafts on the tiny engines: its rows, and its prompts."""

import argparse
from types import SimpleNamespace

import pytest

from jaxinfer import prompts
from jaxinfer.bench import speculation
from jaxinfer.config import ConfigError
from tests.fakes import byte_tokenizer


def test_rows_compare_with_the_engine_without_drafts(plain, speculating):
    load = speculation.Load([(1, 2, 3), (5, 6, 5, 6, 5), (7, 8, 9)], 2, 12)
    rows = speculation.measure({"off": plain, "auto": speculating}, load, 1)
    assert [row["way"] for row in rows] == ["off", "auto"]
    assert rows[0]["speedup"] == 1.0 and all(row["equal"] and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["costs_little"] and rows[0]["drafts"] == 0 < rows[1]["drafts"]
    assert rows[0]["drafted_rows"] == rows[0]["acceptance"] == 0
    assert 0 < rows[1]["acceptance"] <= 1 and rows[1]["drafted_rows"] > 0
    assert rows[1]["tokens_per_step"] > rows[0]["tokens_per_step"]


@pytest.mark.parametrize("kind", speculation.KINDS)
def test_prompts_differ_and_say_what_they_want(kind):
    tokenizer = byte_tokenizer()
    found = speculation.prompts(kind, 256, tokenizer)
    assert len({tuple(prompt) for prompt in found}) == 256
    assert ("Copy this text" in tokenizer.decode(found[9])) == (kind in ("copying", "again"))


def test_prompts_of_the_users_own_come_in_their_order_and_over_again(tmp_path):
    file, engine = tmp_path / "own.jsonl", SimpleNamespace(tokenizer=byte_tokenizer(), info=SimpleNamespace(max_model_len=64))
    file.write_text('{"prompt": "first"}\n{"prompt": "a second"}\n')
    lines = prompts.read(file)
    first, second = (list(document.prompt) for document in prompts.encode(lines, engine.tokenizer, 64))
    assert speculation.own(lines, engine, 3, 20) == [first, second, first] and speculation.own(lines, engine, 1, 20) == [first]
    with pytest.raises(ConfigError, match="line 2"):
        speculation.own(lines, engine, 8, 64 - len(first))
    engine.tokenizer = None
    with pytest.raises(ConfigError, match="with a tokenizer"):
        speculation.own(lines, engine, 8, 20)


@pytest.mark.parametrize("more", [["--kind", "chat"], ["--shape", "tiny"]])
def test_prompts_of_two_kinds_are_refused(more):
    parser = argparse.ArgumentParser()
    speculation.add_arguments(parser)
    with pytest.raises(ConfigError, match="leave --kind and --shape out"):
        speculation.run(parser.parse_args(["--data", "own.jsonl", *more]))


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="with a tokenizer"):
        speculation.prompts("story", 1, None)


def test_several_values_stand_with_commas_between_them():
    parser = argparse.ArgumentParser()
    speculation.add_arguments(parser)
    found = parser.parse_args(["--batch", "1,8,64", "--batch", "256", "--way", "lookup,auto", "--kind", "chat"])
    assert (found.batch, found.way, found.kind) == ([1, 8, 64, 256], ["lookup", "auto"], ["chat"])
    for flags in (["--batch", "0"], ["--batch", "x"], ["--way", "lookup,magic"], ["--kind", ","]):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
