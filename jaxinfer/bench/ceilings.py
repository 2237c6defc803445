"""What the machine at hand can do at most: bytes read per second, operations per second; measured, to be held beside results.

Random data (zeros flatter), arrays larger than any cache, many launches in flight before one wait, the best of several rounds (a
ceiling is what the machine reaches undisturbed).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s read from memory, and operations/s of a matmul in one dtype."""

    bandwidth: float
    matmul: float
    dtype: str

    def fields(self) -> dict[str, Any]:
        """As fields of a row."""
        return {"dtype": self.dtype, "read_bytes_per_second": self.bandwidth, "matmul_operations_per_second": self.matmul}

    def decode_floor(self, nbytes: float) -> float:
        """Seconds that reading so many bytes takes at least."""
        return nbytes / self.bandwidth

    def compute_floor(self, operations: float) -> float:
        """Seconds that so many operations take at least."""
        return operations / self.matmul


def measure(dtype: Any, *, megabytes: int | None = None, size: int | None = None) -> Ceilings:
    """Measure the first device. megabytes: array that is read (by default 4096 on accelerators, 256 on CPUs); size: of the square
    matrices (by default 8192 and 2048)."""
    large = jax.default_backend() != "cpu"
    bandwidth = read_bandwidth((megabytes or (4096 if large else 256)) << 20)
    return Ceilings(bandwidth, matmul_rate(dtype, size or (8192 if large else 2048)), str(jnp.dtype(dtype)))


def read_bandwidth(nbytes: int) -> float:
    """Bytes per second of a pass that reads an array of `nbytes` once and writes next to nothing."""
    rows = max(1, nbytes // (4 * 8192))
    x = _random((rows, 8192), jnp.float32)
    return x.nbytes / _seconds(jax.jit(lambda x: jnp.max(x, axis=1)), x)


def matmul_rate(dtype: Any, size: int) -> float:
    """Operations per second (a multiply and an add are two) of [size, size] @ [size, size]."""
    x, y = _random((size, size), dtype), _random((size, size), dtype)
    product = jax.jit(lambda x, y: jax.lax.dot(x, y, preferred_element_type=x.dtype))
    return 2 * size**3 / _seconds(product, x, y)


def _random(shape: tuple[int, int], dtype: Any) -> Array:
    return jax.jit(lambda key: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0).astype(dtype))(jax.random.key(shape[0]))


def _seconds(function: Callable[..., Array], *arguments: Array) -> float:
    """Seconds of one call: as many calls in flight as fill about 50 ms, the best round."""
    function(*arguments).block_until_ready()
    start = time.perf_counter()
    function(*arguments).block_until_ready()
    calls = max(1, min(64, int(0.05 / max(time.perf_counter() - start, 1e-6))))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        best = min(best, (time.perf_counter() - start) / calls)
    return best
