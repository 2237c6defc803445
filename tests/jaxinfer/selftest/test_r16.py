"""R16 holds on the tiny engine, and sees pages that are not wiped."""

from dataclasses import replace

import pytest

from jaxinfer.__main__ import main
from jaxinfer.config import ConfigError
from jaxinfer.selftest import r16


def test_it_holds(tested):
    verdict = r16.check(tested, 2, 0, prompts=5)
    assert verdict.passed, verdict.counts
    assert verdict.counts["ill"] == 8 and verdict.counts["sequences"] > 0


@pytest.mark.ci
def test_it_holds_where_inputs_are_rounded_to_int8():
    """A bad number must not be rounded to a good one."""
    assert main(["selftest", "R16", "--rounds", "1", "--quantize", "w8a8"]) == 0


def test_pages_that_are_not_wiped_are_seen(tested, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tested.engine.program, "wipe_pages", lambda pages: None)
        verdict = r16.check(tested, 1, 0, prompts=3)
    assert not verdict.passed and verdict.counts["pages_left_bad"] > 0
    tested.engine.program.wipe_pages([(0, page) for page in range(1, tested.pages)])
    assert r16.bad_pages(tested) == 0


def test_an_embedding_that_is_the_head_is_refused(tested, monkeypatch):
    config = tested.engine.program.config
    tied = replace(config, graph=replace(config.graph, config=replace(config.graph.config, tied_embeddings=True)))
    monkeypatch.setattr(tested.engine.program, "config", tied)
    with pytest.raises(ConfigError, match="embedding"), r16.poisoned(tested, 1):
        pass
