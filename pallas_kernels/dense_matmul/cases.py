"""Named shapes of the matmul, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.dense_matmul.api import dense_matmul


@dataclass(frozen=True)
class Case:
    """One compiled shape: x [tokens, features] times a weight [outputs, features]."""

    name: str
    tokens: int
    features: int
    outputs: int
    dtype: str = "bfloat16"

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("x", "weight")

    def tuning_key(self) -> dict[str, int | str]:
        """What there is to know of the case."""
        return {"tokens": self.tokens, "in": self.features, "out": self.outputs, "dtype": self.dtype}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        return {
            "x": jnp.asarray(rng.standard_normal((self.tokens, self.features), np.float32).astype(dtype)),
            "weight": jnp.asarray(rng.standard_normal((self.outputs, self.features), np.float32).astype(dtype)),
        }

    def run(self, inputs: dict[str, Any], implementation: str) -> jax.Array:
        """The op on what `make` gave."""
        return dense_matmul(inputs["x"], inputs["weight"], implementation=implementation)

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, the products out."""
        moved = sum(x.nbytes for x in inputs.values()) + self.tokens * self.outputs * jnp.dtype(self.dtype).itemsize
        return Cost(moved, 2 * self.tokens * self.features * self.outputs)


CASES = (
    Case("one", tokens=1, features=96, outputs=200, dtype="float32"),
    Case("few", tokens=5, features=448, outputs=192),
    Case("sixteen", tokens=16, features=512, outputs=128, dtype="float16"),
    Case("many", tokens=70, features=64, outputs=128),
)

_8B = (("qkv", 4096, 6144), ("out", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
TUNING = tuple(Case(f"8b_{name}_{tokens}", tokens, features, outputs) for name, features, outputs in _8B for tokens in (1, 16, 64, 128))
