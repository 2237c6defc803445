import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Target

CPU, TPU, H200 = Target("cpu", "cpu"), Target("tpu", "TPU v5e"), Target("gpu", "NVIDIA H200")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    dispatch._log_once.cache_clear()
    yield
    dispatch._log_once.cache_clear()


@pytest.fixture
def picky(monkeypatch):
    """An op whose gpu implementation refuses what is large, and why."""
    modules = {"gpu": SimpleNamespace(refusal=lambda target, key: "too large" if key.get("size", 0) > 9 else None)}
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference", "xla", "gpu"))
    monkeypatch.setattr(dispatch, "_module", lambda op, name: modules.get(name, SimpleNamespace(name=name)))
    return modules


def test_ops_and_implementations_are_found():
    matmuls = ("dense_matmul", "grouped_matmul", "quantized_matmul")
    assert set(dispatch.ops()) == {*matmuls, "flash_attention", "paged_attention", "residual_norm", "token_chain"}
    assert list(dispatch.ops()) == sorted(dispatch.ops())
    for op in dispatch.ops():
        assert dispatch.implementations(op)[:2] == ("reference", "xla")


@pytest.mark.parametrize("target", [CPU, TPU, H200, Target("something new", "x")])
def test_auto_takes_what_exists(target):
    module = dispatch.resolve("quantized_matmul", "auto", target)
    assert module.__name__.removeprefix("pallas_kernels.quantized_matmul.") in dispatch.implementations("quantized_matmul")


def test_by_name():
    assert dispatch.resolve("flash_attention", "reference", TPU).__name__ == "pallas_kernels.flash_attention.reference"


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"unknown op 'softmax'.*paged_attention"):
        dispatch.resolve("softmax", "auto", CPU)
    with pytest.raises(ValueError, match="unknown implementation 'cuda' for flash_attention: use 'auto' or one of reference, xla"):
        dispatch.resolve("flash_attention", "cuda", H200)


def test_a_missing_implementation_says_what_there_is(monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference", "xla"))
    with pytest.raises(NotImplementedError, match="implementation='gpu' does not exist for paged_attention: there are reference, xla"):
        dispatch.choose("paged_attention", "gpu", H200)


def test_auto_with_nothing_to_run(monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference",))
    with pytest.raises(NotImplementedError, match="no implementation for platform 'cpu'"):
        dispatch.choose("paged_attention", "auto", CPU)


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference", "xla"))
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("paged_attention", "auto", H200) == "xla"
    assert [record.message for record in caplog.records] == [
        "paged_attention runs its 'xla' implementation on platform 'gpu' (paged_attention has no gpu implementation yet)"
    ]


def test_auto_passes_over_what_refuses_and_says_so_once(caplog, picky):
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        for size in (10, 9, 10, 11):
            assert dispatch.choose("paged_attention", "auto", H200, {"size": size}) == ("gpu" if size < 10 else "xla")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "paged_attention runs its 'xla' implementation on platform 'gpu' instead of 'gpu': too large"),
        ("INFO", "paged_attention runs its 'gpu' implementation on platform 'gpu'"),
    ]


def test_what_is_named_and_refuses_is_an_error(picky):
    assert dispatch.choose("paged_attention", "gpu", H200) == "gpu"
    assert dispatch.refusal("paged_attention", "gpu", H200, {"size": 10}) == "too large"
    with pytest.raises(NotImplementedError, match="paged_attention cannot run implementation='gpu': too large; 'auto' picks one that can"):
        dispatch.choose("paged_attention", "gpu", H200, {"size": 10})


def test_everything_refuses(picky):
    picky["xla"] = SimpleNamespace(refusal=lambda target, key: "too old")
    with pytest.raises(NotImplementedError, match=r"no implementation for platform 'gpu'.*'gpu': too large; 'xla': too old"):
        dispatch.choose("paged_attention", "auto", H200, {"size": 10})


def test_target_is_the_default_device():
    assert dispatch.target() == Target("cpu", jax.devices()[0].device_kind)


def test_target_follows_an_abstract_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)).abstract_mesh
    device = type(mesh.abstract_device)(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    described = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, abstract_device=device)
    with jax.sharding.use_abstract_mesh(described):
        assert dispatch.target() == H200


def test_what_wants_to_be_named_is_passed_over_by_auto_alone(caplog, picky):
    picky["gpu"] = SimpleNamespace(by_name=lambda key: None if key.get("size") == 1 else "too young")
    with caplog.at_level("INFO", logger="pallas_kernels.dispatch"):
        assert dispatch.choose("paged_attention", "auto", H200) == "xla"
    assert "instead of 'gpu': too young" in caplog.text
    assert dispatch.choose("paged_attention", "gpu", H200) == "gpu"
    assert dispatch.choose("paged_attention", "auto", H200, {"size": 1}) == "gpu"


def test_a_target_may_be_assumed():
    with dispatch.assumed(TPU):
        assert dispatch.target() == TPU
    assert dispatch.target().platform == "cpu"
