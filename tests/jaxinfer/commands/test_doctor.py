"""`jaxinfer doctor`: findings, the wall around each check, and what must not be shown."""

import argparse
import json
import socket
from pathlib import Path

import jax
import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import ceilings
from jaxinfer.checkpoint import hub
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.commands import doctor
from jaxinfer.commands.doctor import Status

NO_FLAGS = argparse.Namespace(port=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda dtype: ceilings.Ceilings(3e12, 400e12, str(dtype)))


def only(check, args=NO_FLAGS):
    return next(iter(check(args)))


def test_all_is_well_here(capsys):
    assert program.main(["doctor", "--json", "--port", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in found["findings"]][:4] == ["python", "packages", "environment", "devices"]
    assert found["findings"][-1]["detail"].startswith("demo: 1") and found["status"] == "OK", found


def test_people_get_lines_and_fixes(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(RuntimeError("no backend at http://me:secret@host/\nmore")))
    monkeypatch.setattr(hub, "resolve", lambda name: (_ for _ in ()).throw(CheckpointError("demo: a tensor is missing")))
    assert program.main(["doctor", "--port", "0"]) == 1
    out = capsys.readouterr().out
    assert "OK    python" in out and "FAIL  devices" in out and "\n      -> check the driver" in out
    assert "RuntimeError: no backend at http://***@host/" in out and "more" not in out
    assert "FAIL  embedded model    CheckpointError: demo: a tensor is missing" in out


def test_secrets_are_filtered(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("JAXINFER_API_KEY", "sesame")
    monkeypatch.setenv("UNRELATED", "x")
    detail = only(doctor.environment).detail
    assert "HF_TOKEN=***" in detail and "sesame" not in detail and "UNRELATED" not in detail and "JAX_PLATFORMS=cpu" in detail


def test_versions_that_do_not_fit(monkeypatch):
    numbers = dict.fromkeys(doctor.PACKAGES, "1.0")
    monkeypatch.setattr(doctor, "_version", numbers.get)
    assert list(doctor.versions(NO_FLAGS))[1].status is Status.WARN
    numbers["flax"] = None
    finding = list(doctor.versions(NO_FLAGS))[1]
    assert finding.status is Status.FAIL and "missing: flax" in finding.detail
    assert doctor._version is not None


def test_a_package_that_is_not_there():
    assert doctor._version("no-such-package-here") is None


def test_an_unused_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 580.1\nGCC\n")
    assert only(doctor.devices).fix == "pip install 'jaxinfer[cuda]'"
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setattr(doctor, "TPU_NODES", (str(tmp_path / "version"),))
    assert only(doctor.devices).fix == "pip install 'jaxinfer[tpu]'"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "file" / "below"))
    finding = only(doctor.cache)
    assert finding.status is Status.WARN and "JAXINFER_CACHE_DIR" in finding.fix


def test_a_large_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    (tmp_path / "program").write_bytes(b"12345")
    assert only(doctor.cache).status is Status.OK
    monkeypatch.setattr(doctor, "LARGE_CACHE", 4)
    assert only(doctor.cache).fix == f"delete {tmp_path}; it fills again as programs are compiled"


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finding = only(doctor.port, argparse.Namespace(port=other.getsockname()[1]))
    assert finding.status is Status.WARN and "--port" in finding.fix


def test_a_wrong_program(monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda function: lambda x: x)
    assert only(doctor.program).status is Status.FAIL


def test_speed_is_held_against_the_chip():
    assert doctor._against("memory bandwidth", 4.3e12, "GB/s", 4.8e12).detail == "4,300 GB/s, 90% of the chip's 4,800"
    assert doctor._against("memory bandwidth", 2.0e12, "GB/s", 4.8e12).status is Status.WARN
    assert [finding.status for finding in doctor.speed(NO_FLAGS)] == [Status.OK, Status.OK]
    assert Path(doctor.NVIDIA_DRIVER).is_absolute()
