import logging

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch


def test_ops_and_implementations_are_found():
    assert dispatch.ops() == ("flash_attention", "paged_attention", "quantized_matmul")
    for op in dispatch.ops():
        assert dispatch.implementations(op)[:2] == ("reference", "xla")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "something new"])
def test_auto_takes_what_exists(platform):
    module = dispatch.resolve("paged_attention", "auto", platform)
    assert module.__name__.removeprefix("pallas_kernels.paged_attention.") in dispatch.implementations("paged_attention")


def test_by_name():
    assert dispatch.resolve("flash_attention", "reference", "tpu").__name__ == "pallas_kernels.flash_attention.reference"


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"unknown op 'softmax'.*paged_attention"):
        dispatch.resolve("softmax", "auto", "cpu")
    with pytest.raises(ValueError, match="unknown implementation 'cuda' for paged_attention: use 'auto' or one of reference, xla"):
        dispatch.resolve("paged_attention", "cuda", "gpu")


def test_a_missing_implementation_says_what_there_is(monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference", "xla"))
    dispatch.choose.cache_clear()
    with pytest.raises(NotImplementedError, match="implementation='gpu' does not exist for paged_attention: there are reference, xla"):
        dispatch.choose("paged_attention", "gpu", "gpu")
    dispatch.choose.cache_clear()


def test_auto_with_nothing_to_run(monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference",))
    dispatch.choose.cache_clear()
    with pytest.raises(NotImplementedError, match="no implementation for platform 'cpu'"):
        dispatch.choose("paged_attention", "auto", "cpu")
    dispatch.choose.cache_clear()


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("reference", "xla"))
    dispatch.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("paged_attention", "auto", "gpu") == "xla"
    assert [record.message for record in caplog.records] == [
        "paged_attention runs its 'xla' implementation on platform 'gpu' (paged_attention has no gpu implementation yet)"
    ]
    dispatch.choose.cache_clear()


def test_target_is_the_default_device():
    assert dispatch.target() == dispatch.Target("cpu", jax.devices()[0].device_kind)


def test_target_follows_an_abstract_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)).abstract_mesh
    device = type(mesh.abstract_device)(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    described = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, abstract_device=device)
    with jax.sharding.use_abstract_mesh(described):
        assert dispatch.target() == dispatch.Target("gpu", "NVIDIA H200")
