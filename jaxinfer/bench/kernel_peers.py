"""What else could do a kernel's work: named peers per op, measured in the same run over the same shapes.

`PEERS` is found by op name; the first peer of an op that runs is the one ratios refer to. Attention over contiguous keys has cuDNN's
(through jax) and torch's; no library has a paged one that would fit, so prefill cases are held against contiguous attention of the same
sequences: cuDNN's, torch's and ours (`contiguous-NAME`). A peer raises NotImplementedError for what it cannot do.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels import timing
from pallas_kernels.timing import Settings, Timing

CONTIGUOUS = "contiguous-"
UNFIT = (NotImplementedError, ValueError, RuntimeError)  # what libraries raise for shapes they refuse

Peer = Callable[[Any, Settings], Timing]


def peers(op: str) -> Mapping[str, Peer]:
    """The peers of an op by name, the one that ratios refer to first."""
    return PEERS.get(op, {})


def cudnn(case: Any, settings: Settings) -> Timing:
    """cuDNN's attention through jax."""
    _check_plain(case)
    if jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN is for GPUs")
    window = None if case.window is None else (case.window - 1, 0)

    def run(inputs: dict[str, Any]) -> jax.Array:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        causal = case.causal == "causal"
        return jax.nn.dot_product_attention(
            q, k, v, scale=case.spec.scale, is_causal=causal, local_window_size=window, implementation="cudnn"
        )

    return timing.measure(case, run, case.make, settings)


def torch_sdpa(case: Any, settings: Settings) -> Timing:
    """torch's scaled_dot_product_attention with its cuDNN or flash backend, as a CUDA graph of several calls."""
    _check_plain(case)
    if importlib.util.find_spec("torch") is None:
        raise NotImplementedError("this interpreter has no torch")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise NotImplementedError("this interpreter's torch has no CUDA")
    if case.window is not None:
        raise NotImplementedError("torch's attention has no window")
    attention, backends = torch.nn.functional.scaled_dot_product_attention, torch.nn.attention.SDPBackend
    copies = _torch_copies(torch, case, settings)
    settle = partial(torch.nn.attention.sdpa_kernel, [backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION], set_priority=True)

    def calls(count: int) -> None:
        with settle():
            for index in range(count):
                q, k, v = copies[index % len(copies)]
                attention(q, k, v, is_causal=case.causal == "causal", scale=case.spec.scale, enable_gqa=case.group > 1)

    return replace(_graphed(torch, calls, settings), cost=case.cost({}))


def contiguous(case: Any) -> Any:
    """The flash attention case that does the work of a paged prefill of new sequences."""
    from pallas_kernels.flash_attention.cases import Case

    rows, length = case.prefill_rows, case.pages_per_row * case.page_size
    if case.decode_rows or case.lengths != "full" or rows * length != case.prefill_tokens or "sinks" in case.extras:
        raise NotImplementedError("only a prefill of whole sequences has a contiguous equivalent")
    sizes = {"kv_heads": case.kv_heads, "group": case.group, "head_dim": case.head_dim, "dtype": case.dtype}
    return Case(case.name, rows, length, length, **sizes, window=case.window, soft_cap=case.soft_cap)


def _ours(name: str, case: Any, settings: Settings) -> Timing:
    """Our own contiguous attention."""
    from pallas_kernels import dispatch

    if name not in dispatch.implementations("flash_attention"):
        raise NotImplementedError(f"flash_attention has no {name!r} implementation")
    flat = contiguous(case)
    return timing.measure(flat, lambda inputs: flat.run(inputs, name), flat.make, settings)


def _check_plain(case: Any) -> None:
    if case.soft_cap is not None or case.extras:
        raise NotImplementedError("libraries have neither soft cap nor sinks, and ragged lengths of their own kind")
    if case.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"libraries' attention kernels compute in bfloat16 or float16, not in {case.dtype}")
    if case.causal == "causal" and case.queries != case.keys:
        raise NotImplementedError("libraries disagree about the causal edge of fewer queries than keys")


def _torch_copies(torch: Any, case: Any, settings: Settings) -> list[list[Any]]:
    """Random q, k and v [batch, heads, length, head_dim], views of [batch, length, heads, head_dim] as ours are."""
    lengths = {"q": (case.queries, case.kv_heads * case.group), "k": (case.keys, case.kv_heads), "v": (case.keys, case.kv_heads)}
    nbytes = sum(int(np.prod(size)) for size in lengths.values()) * case.batch * case.head_dim * 2
    copies = settings.copies or max(timing.FEWEST, -(-timing.TIMES * timing.CACHE // nbytes))
    options = {"dtype": getattr(torch, case.dtype), "device": "cuda"}
    return [[torch.randn(case.batch, *size, case.head_dim, **options).transpose(1, 2) for size in lengths.values()] for _ in range(copies)]


def _graphed(torch: Any, calls: Callable[[int], None], settings: Settings) -> Timing:
    """Time a recorded graph of calls; it is long enough for dispatch and wait not to count."""

    def seconds(work: Callable[[], None], runs: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            work()
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / runs

    with torch.inference_mode():
        seconds(partial(calls, 3), 1)
        dispatch = seconds(lambda: None, 20) + 20e-6  # launching a graph
        count = min(settings.limit(), max(1, round(dispatch / timing.SHARE / max(seconds(partial(calls, 10), 1) / 10, 5e-6))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls(count)
        once = seconds(graph.replay, 3)
        runs = max(1, int(timing.ROUND / once))
        return Timing([seconds(graph.replay, runs) / count for _ in range(settings.repeat)], count, dispatch, None)


PEERS: dict[str, dict[str, Peer]] = {
    "flash_attention": {"peer-cudnn": cudnn, "peer-torch-sdpa": torch_sdpa},
    "paged_attention": {
        "peer-cudnn": lambda case, settings: cudnn(contiguous(case), settings),
        "peer-torch-sdpa": lambda case, settings: torch_sdpa(contiguous(case), settings),
        **{f"{CONTIGUOUS}{name}": partial(_ours, name) for name in ("gpu", "tpu", "xla")},
    },
}
