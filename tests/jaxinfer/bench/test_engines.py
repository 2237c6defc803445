"""How benchmarks choose, open and drive engines, over an echo."""

import argparse
import gc

import pytest

from jaxinfer.bench import engines
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.engine import engine as engine_module
from tests.fakes import FakeEngine


def flags(**values):
    return argparse.Namespace(**{"shape": None, **values})


def test_settings_are_as_given_without_a_shape():
    assert engines.settings_of(flags(model="demo", dtype="float16"), 100) == {"shape": None, "model": "demo", "dtype": "float16"}


def test_a_shape_takes_the_context_that_is_needed_and_no_more_than_it_has():
    for longest, length in ((100, 100), (1000, 256)):
        found = engines.settings_of(flags(shape="tiny", model="demo"), longest)
        assert (found["model"], found["load_format"], found["max_model_len"]) == ("tiny", "random", length)
    assert engines.settings_of(flags(shape="tiny", max_model_len=64), 100)["max_model_len"] == 64


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"there are: llama-3.1-8b, .*did you mean 'tiny'"):
        engines.settings_of(flags(shape="tini"), 100)


def test_the_collector_passes_over_engines_while_they_are_measured(monkeypatch):
    monkeypatch.setattr(engine_module, "Engine", lambda config, *, progress: FakeEngine())
    with engines.opened([EngineConfig()]):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_all_are_closed_when_one_cannot_be_built(monkeypatch):
    made = []

    def build(config, *, progress):
        if made:
            raise ConfigError("no room")
        made.append(FakeEngine())
        return made[-1]

    monkeypatch.setattr(engine_module, "Engine", build)
    with pytest.raises(ConfigError, match="no room"), engines.opened([EngineConfig(), EngineConfig()]):
        pass
    assert made[0].closed


def test_requests_share_a_salt_with_each_other_alone():
    first, second = engines.requests([(1, 2), [3]], [4, 5]), engines.requests([(1, 2), [3]], [4, 5])
    assert [(r.id, r.prompt, r.params.max_tokens) for r in first] == [("bench-0", (1, 2), 4), ("bench-1", (3,), 5)]
    assert all(r.params.greedy and r.params.stop.ignore_eos for r in first)
    assert [len({r.cache_salt for r in batch}) for batch in (first, second, first + second)] == [1, 1, 2]


def test_a_full_line_is_waited_for():
    engine = FakeEngine(queue_limit=2)
    made = engines.run_all(engine, engines.requests([(1, 2)] * 5, [3, 1, 4, 1, 5]))
    assert [made[f"bench-{number}"] for number in range(5)] == [3, 1, 4, 1, 5]


def test_tokens_are_drawn_from_what_the_tokenizer_knows():
    engine = FakeEngine()
    assert engines.vocabulary(engine) == engine.tokenizer.vocab_size
