"""Records of audits: of these weights or none, within the budget or refused, never damaged in silence."""

import json

import pytest

from jaxinfer.checkpoint import audit_record, manifest
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    return tmp_path


def record(folder, kl=0.01, scheme="int8", **more):
    return audit_record.write(folder, {scheme: {"weights": audit_record.fingerprint(folder), "kl_mean": kl, **more}})


def require(folder, scheme="int8", wanted="kl=0.02"):
    audit_record.require(folder, scheme, wanted, "MODEL")


def test_a_good_audit_passes_and_nothing_quantised_needs_none(folder):
    require(folder, scheme="")
    require(None, scheme="")
    record(folder, 0.02)
    require(folder)


def test_without_an_audit_the_command_is_said(folder):
    said = r"MODEL with int8 has no recorded audit; run: python -m jaxinfer audit quant --model MODEL --schemes 'int8' .*--record"
    for where in (folder, None):
        with pytest.raises(ConfigError, match=said):
            require(where)
    record(folder, scheme="int4")
    with pytest.raises(ConfigError, match=said):
        require(folder)
    with pytest.raises(ConfigError, match=r"--reference UNQUANTISED --schemes 'stored[+]kv-int8'"):
        require(folder, scheme="stored+kv-int8")


@pytest.mark.parametrize("kl", [0.021, None])
def test_an_audit_over_the_budget(folder, kl):
    record(folder, kl)
    with pytest.raises(ConfigError, match="has an audit over it"):
        require(folder)


@pytest.mark.parametrize("changed", ["a.safetensors", "b.safetensors", "config.json"])
def test_an_audit_of_other_weights(folder, changed):
    record(folder)
    (folder / changed).write_bytes(b'{"other": 1}')
    with pytest.raises(ConfigError, match="has an audit of other weights"):
        require(folder)


def test_a_manifest_stands_for_the_weights(folder):
    (folder / manifest.NAME).write_text("{}")
    record(folder)
    (folder / "a.safetensors").write_bytes(b"changed: loading notices")
    require(folder)
    (folder / manifest.NAME).write_text('{"other": 1}')
    with pytest.raises(ConfigError, match="of other weights"):
        require(folder)


def test_a_later_audit_replaces_the_one_of_its_scheme(folder):
    record(folder, 0.5)
    record(folder, 0.4, scheme="int4")
    path = record(folder, 0.01)
    audits = json.loads(path.read_text())["audits"]
    assert {name: entry["kl_mean"] for name, entry in audits.items()} == {"int8": 0.01, "int4": 0.4}
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "audits": {}}', '{"format": 1, "audits": {"int8": 3}}', '{"format": 1}'])
def test_damaged_records(folder, text):
    (folder / "audit.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"audit\.json"):
        require(folder)


@pytest.mark.parametrize("kl", ["0.01", True, -1, [1]])
def test_damaged_figures(folder, kl):
    record(folder, kl)
    with pytest.raises(CheckpointError, match="kl_mean"):
        require(folder)
    (folder / "audit.json").write_text('{"format": 1, "audits": {"int8": {"weights": "x"}}}')
    with pytest.raises(CheckpointError, match="kl_mean"):
        require(folder)


def test_what_cannot_be_read_or_written(folder):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        audit_record.fingerprint(folder / "none")
    with pytest.raises(CheckpointError, match="cannot be written"):
        audit_record.write(folder / "none", {})


def test_names(folder):
    assert audit_record.name_of(None, "auto", stored=False) == ""
    assert audit_record.name_of("int8, lm_head=keep", "auto", stored=False) == "int8,lm_head=keep"
    assert audit_record.name_of("int8", "fp8", stored=False) == "int8+kv-fp8"
    assert audit_record.name_of(None, "int8", stored=True) == "stored+kv-int8"
    assert not audit_record.is_quantised(folder)
    (folder / "config.json").write_text('{"quantization_config": {}}')
    assert audit_record.is_quantised(folder)
