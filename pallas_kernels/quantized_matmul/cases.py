"""Named shapes of the quantised matmul, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.quantized_matmul.api import quantized_matmul


@dataclass(frozen=True)
class Case:
    """One compiled shape: x [tokens, features] times a weight [outputs, features]."""

    name: str
    tokens: int
    features: int
    outputs: int
    dtype: str = "float32"

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("x", "weight", "scales")

    def tuning_key(self) -> dict[str, int | str]:
        """The key that block sizes for this case are looked up by."""
        return {"tokens": self.tokens, "in": self.features, "out": self.outputs, "dtype": self.dtype}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`: weights over the whole int8 range, -128 included, and scales over three orders of magnitude."""
        rng = np.random.default_rng(seed)
        return {
            "x": jnp.asarray(rng.standard_normal((self.tokens, self.features), np.float32).astype(jnp.dtype(self.dtype))),
            "weight": jnp.asarray(rng.integers(-128, 128, (self.outputs, self.features), np.int8)),
            "scales": jnp.asarray((10.0 ** rng.uniform(-4, -1, self.outputs)).astype(np.float32)),
        }

    def run(self, inputs: dict[str, Any], implementation: str) -> jax.Array:
        """The op on what `make` gave."""
        return quantized_matmul(inputs["x"], inputs["weight"], inputs["scales"], implementation=implementation)

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, the products out."""
        moved = sum(x.nbytes for x in inputs.values()) + self.tokens * self.outputs * jnp.dtype(self.dtype).itemsize
        return Cost(moved, 2 * self.tokens * self.features * self.outputs)


CASES = (
    Case("one", tokens=1, features=96, outputs=200),
    Case("few", tokens=5, features=384, outputs=33, dtype="bfloat16"),
    Case("many", tokens=70, features=64, outputs=128),
)

TUNING = (
    Case("demo_one", tokens=1, features=384, outputs=1024),
    Case("8b_gate_up_one", tokens=1, features=4096, outputs=28672, dtype="bfloat16"),
    Case("8b_gate_up_16", tokens=16, features=4096, outputs=28672, dtype="bfloat16"),
)
