"""Peers say what they refuse; what they are asked for is what ours are asked for. torch is a stub here."""

import importlib.machinery
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.bench import kernel_peers
from pallas_kernels import timing
from pallas_kernels.flash_attention import cases as flash
from pallas_kernels.paged_attention import cases as paged
from pallas_kernels.timing import Settings, Timing

QUICK = Settings(repeat=1, most_calls=1, copies=1)
SMALL = flash.Case("small", batch=1, queries=16, keys=16, group=2, dtype="bfloat16", window=5)
PREFILL = paged.Case("fresh", prefill_rows=2, prefill_tokens=64, pages_per_row=2, dtype="bfloat16", lengths="full", extras=frozenset())


def test_the_first_peer_is_cudnn():
    for op in ("flash_attention", "paged_attention"):
        assert next(iter(kernel_peers.peers(op))) == "peer-cudnn"
    assert kernel_peers.peers("quantized_matmul") == {}


UNFIT = (flash.CASES[2], flash.Case("wide"), flash.Case("chunk", queries=8, keys=16, dtype="bfloat16"), SMALL)


@pytest.mark.parametrize("peer", [kernel_peers.cudnn, kernel_peers.torch_sdpa])
@pytest.mark.parametrize("case", UNFIT, ids=lambda case: case.name)
def test_refusals(peer, case):
    with pytest.raises(NotImplementedError):
        peer(case, QUICK)


def test_cudnn_is_asked_for_our_arithmetic(monkeypatch):
    """XLA's own implementation, in its place, gives what ours gives."""
    theirs, found = jax.nn.dot_product_attention, []

    def measure(case, run, make, settings):
        found.append(run(make(0)))
        return Timing([1.0], 1, 0.0, None)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **rest: theirs(*args, implementation="xla", **rest))
    monkeypatch.setattr(timing, "measure", measure)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        kernel_peers.cudnn(SMALL, QUICK)
    ours = SMALL.run(SMALL.make(0), "reference")
    np.testing.assert_allclose(np.asarray(found[0], np.float32), np.asarray(ours, np.float32), atol=0.03)


def test_contiguous_equivalent_does_the_same_work():
    flat = kernel_peers.contiguous(PREFILL)
    assert (flat.batch, flat.queries, flat.keys) == (2, 32, 32)
    assert flat.cost({}) == PREFILL.cost(PREFILL.make(0))
    assert kernel_peers.peers("paged_attention")["contiguous-xla"](PREFILL, QUICK).cost == flat.cost({})
    for case in (paged.BENCH[0], paged.CASES[3]):
        with pytest.raises(NotImplementedError, match="whole sequences"):
            kernel_peers.contiguous(case)
    with pytest.raises(NotImplementedError, match="no 'nothing'"):
        kernel_peers._ours("nothing", PREFILL, QUICK)


class Graph:
    def replay(self):
        sum(range(1000))


def torch_stub(calls):
    class Array(np.ndarray):
        def transpose(self, *axes):
            return self.swapaxes(*axes)

    cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: None, CUDAGraph=Graph, graph=lambda graph: nullcontext())
    backends = SimpleNamespace(CUDNN_ATTENTION="cudnn", FLASH_ATTENTION="flash")
    nn = SimpleNamespace(
        functional=SimpleNamespace(scaled_dot_product_attention=lambda q, k, v, **rest: calls.append((q.shape, k.shape, rest))),
        attention=SimpleNamespace(SDPBackend=backends, sdpa_kernel=lambda backends, set_priority: nullcontext()),
    )
    return SimpleNamespace(
        __spec__=importlib.machinery.ModuleSpec("torch", None), cuda=cuda, nn=nn, bfloat16=jnp.bfloat16, inference_mode=nullcontext,
        randn=lambda *size, dtype, device: np.zeros(size, dtype).view(Array),
    )  # fmt: skip


def test_torch_is_asked_for_our_arithmetic(monkeypatch):
    calls = []
    monkeypatch.setitem(__import__("sys").modules, "torch", torch_stub(calls))
    timing = kernel_peers.peers("paged_attention")["peer-torch-sdpa"](PREFILL, Settings(repeat=2, most_calls=7))
    assert calls[-1] == ((2, 6, 32, 64), (2, 2, 32, 64), {"is_causal": True, "scale": 0.125, "enable_gqa": True})
    assert timing.calls <= 7 and len(timing.seconds) == 2 and timing.cost == kernel_peers.contiguous(PREFILL).cost({})
