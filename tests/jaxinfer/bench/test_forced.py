"""Forced acceptance on the tiny engines: rows, rates, and that it can be taken back."""

import argparse

import pytest

from jaxinfer.bench import forced
from jaxinfer.config import ConfigError


def test_drafts_stand_as_often_as_is_said(plain, speculating):
    forced.force(speculating, 1.0)
    try:
        off, eagle = forced.measure(plain, speculating, forced.Load(2, 5, 16), 1)
    finally:
        forced.force(speculating, None)
    assert (off["way"], off["speedup"]) == ("off", 1.0) and off["itl_ms"] > 0
    assert eagle["acceptance"] == 1.0 and eagle["tokens_per_step"] > 2.5 and eagle["speedup"] > 0
    assert speculating.program.config.forced is None


def test_rates_are_shares():
    with pytest.raises(ConfigError, match="shares from 0 to 1"):
        forced.run(argparse.Namespace(forced=[1.5], batch=None))
