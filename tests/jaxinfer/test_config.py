"""Settings check themselves, and the command line follows from them."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from jaxinfer import config
from jaxinfer.config import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    ExecutionConfig,
    MeshShape,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculationConfig,
    add_arguments,
    from_arguments,
    parse_audit_budget,
    parse_count,
    parse_mesh,
)


def parse(settings, *flags):
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_arguments(parser, settings)
    return from_arguments(settings, vars(parser.parse_args(flags)))


@pytest.mark.parametrize(("text", "count"), [("0", 0), ("4096", 4096), ("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("007", 7)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "4 k", "²", "1g", "0x10", "٣"])
def test_counts_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=2,tensor=4", (2, 4)), ("tensor=4", (1, 4)), ("", (1, 1)), (" data=3 ,", (3, 1)), ("tensor=1,data=1", (1, 1))],
)
def test_meshes(text, shape):
    assert tuple(parse_mesh(text)) == shape
    assert parse_mesh(text).size == shape[0] * shape[1]


@pytest.mark.parametrize("text", ["pipeline=2", "data", "data=0", "data=-1", "data=two", "data=²", "4", "data=1.5"])
def test_meshes_that_are_none(text):
    with pytest.raises(ConfigError, match="AXIS=SIZE"):
        parse_mesh(text)


def test_audit_budgets():
    assert parse_audit_budget("kl=0.02") == 0.02 and parse_audit_budget("kl=0") == 0
    for text in ("0.02", "kl", "kl=", "kl=x", "kl=-1", "kl=nan", "kl=inf", "perplexity=1"):
        with pytest.raises(ConfigError, match="write kl=NATS"):
            parse_audit_budget(text)


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: ModelConfig(dtype="int4"), "--dtype"),
        (lambda: ModelConfig(load_format="pickle"), "--load-format"),
        (lambda: ModelConfig(max_model_len=1), "--max-model-len"),
        (lambda: ModelConfig(require_audit="0.02"), "--require-audit"),
        (lambda: CacheConfig(page_size=0), "--page-size"),
        (lambda: CacheConfig(page_size=24), "--page-size"),
        (lambda: CacheConfig(prefix_caching="yes"), "--prefix-caching"),
        (lambda: CacheConfig(memory_fraction=0.0), "--memory-fraction"),
        (lambda: CacheConfig(memory_fraction=1.01), "--memory-fraction"),
        (lambda: CacheConfig(memory_fraction=float("nan")), "--memory-fraction"),
        (lambda: CacheConfig(kv_tokens=63), "--kv-tokens"),
        (lambda: SchedulerConfig(max_sequences=0), "--max-sequences"),
        (lambda: SchedulerConfig(max_step_tokens=15), "--max-step-tokens"),
        (lambda: SchedulerConfig(max_waiting=0), "--max-waiting"),
        (lambda: ExecutionConfig(mesh=MeshShape(0, 1)), "mesh"),
        (lambda: ExecutionConfig(implementation="cuda"), "--implementation"),
        (lambda: ExecutionConfig(compilation_cache="yes"), "--compilation-cache"),
        (lambda: ExecutionConfig(compile_threads=-1), "--compile-threads"),
        (lambda: SpeculationConfig("maybe"), "--speculate"),
        (lambda: SpeculationConfig("lookup", draft_tokens=0), "--draft-tokens"),
        (lambda: SpeculationConfig("lookup", draft_tokens=8), "--draft-tokens"),
        (lambda: SpeculationConfig("lookup", draft_model="draft"), "--draft-model"),
        (lambda: EngineConfig(execution=ExecutionConfig(deterministic="on"), speculation=SpeculationConfig("auto")), "--deterministic"),
        (lambda: EngineConfig(execution=ExecutionConfig(deterministic="on"), speculation=SpeculationConfig("eagle")), "--deterministic"),
        (lambda: ServerConfig(port=65536), "--port"),
        (lambda: ServerConfig(shadow_check=1.5), "--shadow-check"),
    ],
)
def test_settings_that_cannot_work_name_their_flag(make, flag):
    with pytest.raises(ConfigError, match=flag):
        make()


def test_every_setting_is_a_flag():
    parser = argparse.ArgumentParser()
    for settings in (EngineConfig, ServerConfig):
        add_arguments(parser, settings)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    parts = (ModelConfig, CacheConfig, SchedulerConfig, ExecutionConfig, SpeculationConfig, ServerConfig)
    leaves = [field for part in parts for field in fields(part)]
    assert {"--" + field.name.replace("_", "-") for field in leaves} <= flags
    assert all(field.metadata["help"] for field in leaves)
    assert "%" not in parser.format_help().replace("%%", "")
    assert len({field.name for field in leaves}) == len(leaves)


def test_flags_become_settings():
    flags = "--model here --max-model-len 8k --mesh data=2,tensor=4 --memory-fraction 0.5 --kv-tokens 1M"
    made = parse(EngineConfig, *flags.split())
    assert made.model == ModelConfig("here", max_model_len=8192)
    assert made.execution == ExecutionConfig(mesh=MeshShape(2, 4))
    assert made.cache == CacheConfig(memory_fraction=0.5, kv_tokens=1 << 20)
    assert made.scheduler == SchedulerConfig()
    assert parse(EngineConfig) == EngineConfig()


@pytest.mark.parametrize(
    "flags", [("--max-model-len", "8q"), ("--mesh", "x=1"), ("--dtype", "int4"), ("--page-size", "x"), ("--memory-fraction", "half")]
)
def test_unreadable_flags_are_usage_errors(flags, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_only_named_variables_of_the_environment_matter(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAXINFER_LOG", "debug")
    monkeypatch.setenv("JAXINFER_API_KEY", "secret")
    assert config.cache_dir() == tmp_path
    assert config.log_level() == "DEBUG"
    assert ServerConfig().api_key == "secret"
    assert ServerConfig(api_key="given").api_key == "given"
    for name in ("JAXINFER_CACHE_DIR", "JAXINFER_LOG", "JAXINFER_API_KEY"):
        monkeypatch.delenv(name)
    assert config.cache_dir() == Path.home() / ".cache" / "jaxinfer"
    assert config.log_level() == "INFO"
    assert ServerConfig().api_key is None


def test_a_log_level_is_one_of_those_that_exist(monkeypatch):
    monkeypatch.setenv("JAXINFER_LOG", "debug")
    assert config.log_level() == "DEBUG"
    monkeypatch.setenv("JAXINFER_LOG", "loud")
    with pytest.raises(config.ConfigError, match="JAXINFER_LOG=LOUD is not one of DEBUG"):
        config.log_level()


def test_how_many_drafts_follows_from_who_makes_them():
    assert [SpeculationConfig(way).drafts for way in ("lookup", "draft", "eagle", "auto")] == [7, 4, 4, 4]
    assert SpeculationConfig("lookup", draft_tokens=2).drafts == 2
