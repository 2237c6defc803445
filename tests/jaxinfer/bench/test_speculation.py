"""The benchmark of drafts on the tiny engines: its rows, and its prompts."""

import argparse
from types import SimpleNamespace

import pytest

from jaxinfer import prompts
from jaxinfer.bench import speculation
from jaxinfer.config import ConfigError
from tests.fakes import byte_tokenizer

LOAD = speculation.Load([(1, 2, 3)], 1, 8)


def test_rows_compare_with_the_engine_without_drafts(plain, speculating, monkeypatch):
    monkeypatch.setattr(speculating.speculator, "always", True)
    speculating._rest = None
    load = speculation.Load([(1, 2, 3), (5, 6, 5, 6, 5), (7, 8, 9), (4, 4, 4)], 2, 12)
    rows = speculation.measure({"off": plain, "auto": speculating, "control": plain}, load, 2)
    off, auto, control = rows
    assert [row["way"] for row in rows] == ["off", "auto", "control"]
    assert off["speedup"] == 1.0 and off["interval"] == (1.0, 1.0) and off["turns"] == [1.0, 1.0]
    assert all(row["equal"] and row["tokens_per_second"] > 0 and row["costs_little"] == "not shown" for row in rows)
    assert off["drafts"] == control["drafts"] == 0 < auto["drafts"]
    assert off["drafted_rows"] == off["acceptance"] == 0
    assert 0 < auto["acceptance"] <= 1 and auto["drafted_rows"] > 0
    assert auto["tokens_per_step"] > off["tokens_per_step"] == control["tokens_per_step"]
    assert auto["speedup"] == pytest.approx(auto["tokens_per_second"] / off["tokens_per_second"])
    assert auto["interval"][0] - 1e-4 <= auto["speedup"] <= auto["interval"][1] + 1e-4 and len(auto["turns"]) == 2


def test_stories_and_chats_have_so_many_tokens_whatever_the_model_says():
    ends = [request.params.stop.ignore_eos for request in (*LOAD.requests(), *LOAD._replace(endless=True).requests())]
    assert ends == [False, True] and set(speculation.ENDLESS) < set(speculation.KINDS)


class Clocked:
    """Stands for an engine whose runs take so many seconds, by how many runs there were before; `ran` is shared and names them all."""

    info = SimpleNamespace(model="m", dtype="float32", kv_dtype="float32", mesh="")
    metrics = SimpleNamespace(drafts=0, draft_tokens=0, accepted_tokens=0)

    def __init__(self, name, ran, seconds, tokens=(1, 2, 3, 4)):
        self.name, self.ran, self.seconds, self.tokens = name, ran, seconds, tokens


@pytest.fixture
def clocked(monkeypatch):
    """Makes such engines. The clock goes on only while they run."""
    now, ran = [0.0], []

    def answers(engine, load):
        now[0] += engine.seconds(len(ran))
        ran.append(engine.name)
        return speculation.Made({"only": engine.tokens}, len(engine.tokens))

    monkeypatch.setattr(speculation, "answers", answers)
    monkeypatch.setattr(speculation, "warm", lambda engine, load: None)
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: now[0])
    return lambda name, seconds, **made: Clocked(name, ran, seconds, **made)


def test_no_engine_runs_right_after_itself_and_turns_share_their_ends(clocked):
    named = {name: clocked(name, lambda number: 1.0) for name in ("off", "lookup", "draft", "control")}
    speculation.measure(named, LOAD, 2)
    assert named["off"].ran == ["off", *3 * ["lookup", "draft", "control", "draft", "lookup", "off"]]


def test_each_turn_runs_one_part_of_the_load_after_another(clocked, monkeypatch):
    named, inner, parts = {name: clocked(name, lambda number: 1.0) for name in ("off", "way", "control")}, speculation.answers, []
    monkeypatch.setattr(speculation, "answers", lambda engine, load: (parts.append(load.texts[0][0]), inner(engine, load))[1])
    rows = speculation.measure(named, speculation.Load([(number,) for number in range(4)], 2, 8), 2)
    assert parts == [0, 2, *3 * [*4 * [0], *4 * [2]]] and [len(row["turns"]) for row in rows] == [2, 2, 2]


def test_what_an_engine_takes_to_get_going_does_not_count(clocked, monkeypatch):
    """A few tokens of each request run right before each run, by the same engine."""
    now, ran, last = [0.0], [], [""]
    named = {name: clocked(name, lambda number: 0.0) for name in ("off", "way", "control")}

    def answers(engine, load):
        now[0] += 1.0 if engine.name == last[0] else 9.0
        last[0], warming = engine.name, load.tokens == speculation.WARMING
        engine.metrics.drafts += 100 if warming else 1
        ran.append((engine.name, load.tokens))
        return speculation.Made({"only": (1, 2)}, 2)

    monkeypatch.undo()
    monkeypatch.setattr(speculation, "answers", answers)
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: now[0])
    for engine in named.values():
        engine.metrics = SimpleNamespace(drafts=0, draft_tokens=0, accepted_tokens=0)
    rows = speculation.measure(named, speculation.Load([(1,)], 1, 96), 3)
    assert [row["tokens_per_second"] for row in rows] == [2.0] * 3
    assert [row["drafted_rows"] for row in rows] == [5, 8, 4]  # of so many runs that count
    assert ran[::2] == [(name, speculation.WARMING) for name, _ in ran[1::2]] and {tokens for _, tokens in ran[1::2]} == {96}
    ran.clear()
    speculation.measure(named, speculation.Load([(1,)], 1, 2), 1)
    assert {tokens for _, tokens in ran} == {2}


def test_parts_that_take_longer_than_others_favour_nobody(clocked, monkeypatch):
    """Each counts as often on both sides of a turn."""
    now, named = [0.0], {name: clocked(name, lambda number: 0.0) for name in ("off", "way", "control")}

    def answers(engine, load):
        now[0] += {0: 1.0, 2: 5.0, 4: 2.0}[load.texts[0][0]]
        return speculation.Made({"only": (1, 2)}, 2)

    monkeypatch.setattr(speculation, "answers", answers)
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: now[0])
    rows = speculation.measure(named, speculation.Load([(number,) for number in range(6)], 2, 8), 3)
    assert all(row["turns"] == [1.0] * 3 and row["interval"] == (1.0, 1.0) for row in rows)


def test_a_machine_that_gets_slower_favours_none(clocked):
    off, way = (clocked(name, lambda number: 10.0 + number) for name in ("off", "way"))
    _, found, control = speculation.measure({"off": off, "way": way, "control": off}, LOAD, 8)
    assert found["speedup"] == pytest.approx(1) and found["turns"] == [1.0] * 8 and found["costs_little"] == "shown"
    assert control["speedup"] == pytest.approx(1) and control["turns"] == [1.0] * 8


@pytest.mark.parametrize(("one", "other"), [(1.0, 1.5), (1.5, 1.0)])
def test_two_engines_without_drafts_need_not_be_equally_fast(clocked, one, other):
    """A way is held beside both, the control beside the first alone."""
    named = {name: clocked(name, lambda number, time=time: time) for name, time in (("off", one), ("way", 1.25), ("control", other))}
    base, found, control = speculation.measure(named, LOAD, 16)
    assert base["speedup"] == found["speedup"] == pytest.approx(1) and control["speedup"] == pytest.approx(one / other)
    assert base["tokens_per_second"] == pytest.approx(4 / 1.25) and control["costs_little"] == ("broken" if other > one else "shown")


@pytest.mark.parametrize(("seconds", "verdict"), [(1.0, "shown"), (1.03, "shown"), (1.04, "broken")])
def test_drafts_may_cost_three_percent(clocked, seconds, verdict):
    times = {"off": 1.0, "way": seconds, "control": 1.0}
    named = {name: clocked(name, lambda number, time=time: time) for name, time in times.items()}
    rows = speculation.measure(named, LOAD, 8)
    assert [row["costs_little"] for row in rows] == ["shown", verdict, "shown"]


def test_longer_answers_may_take_longer(clocked):
    off, way = clocked("off", lambda number: 1.0), clocked("way", lambda number: 1.25, tokens=(1, 2, 3, 4, 5))
    base, found, control = speculation.measure({"off": off, "way": way, "control": off}, LOAD, 1)
    assert found["speedup"] == 1.0 and found["tokens"] == 5 and found["interval"] is None
    assert base["equal"] and control["equal"] and not found["equal"]


def test_tokens_that_differed_once_are_not_equal(clocked, monkeypatch):
    off, way = (clocked(name, lambda number: 1.0) for name in ("off", "way"))
    inner = speculation.answers

    def answers(engine, load):
        made = inner(engine, load)
        return speculation.Made({"only": (9, 9, 9, 9)}, 4) if len(engine.ran) == 6 else made  # in the second of four turns

    monkeypatch.setattr(speculation, "answers", answers)
    rows = speculation.measure({"off": off, "way": way, "control": off}, LOAD, 3)
    assert [row["equal"] for row in rows] == [True, False, True]


def test_turns_go_on_until_the_time_is_over(clocked):
    named = {name: clocked(name, lambda number: 1.0) for name in ("off", "way", "control")}
    assert len(speculation.measure(named, LOAD, 2, 30.0)[1]["turns"]) == 7  # and one that warms up, of 4 seconds each
    assert len(speculation.measure(named, LOAD, 2, 1.0)[1]["turns"]) == 2


def test_seconds_that_mean_nothing_are_refused():
    parser = argparse.ArgumentParser()
    speculation.add_arguments(parser)
    assert (parser.parse_args([]).seconds, parser.parse_args(["--seconds", "2.5"]).seconds) == (0.0, 2.5)
    for text in ("-1", "nan", "inf", "long"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--seconds={text}"])
    with pytest.raises(ConfigError, match="--repeat alone"):
        speculation.run(parser.parse_args(["--seconds", "9", "--shape", "tiny"]))


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
