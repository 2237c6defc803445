"""Named shapes of the quantised matmul, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.quantized_matmul.api import quantized_matmul


@dataclass(frozen=True)
class Case:
    """One compiled shape: x [tokens, features] times a weight [outputs, features].

    group: inputs with a scale of their own (0: all), rows: output channels that share it; zeros: "given" or 8.
    """

    name: str
    tokens: int
    features: int
    outputs: int
    dtype: str = "float32"
    weight: Literal["int8", "fp8", "int4"] = "int8"
    group: int = 0
    rows: int = 1
    zeros: Literal["none", "given"] = "none"
    activations: Literal["float", "int8"] = "float"

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("x", "weight", "scales", "zeros")

    def tuning_key(self) -> dict[str, int | str]:
        """The key that block sizes for this case are looked up by."""
        shape = {"tokens": self.tokens, "in": self.features, "out": self.outputs, "dtype": self.dtype}
        return shape | {"weight": self.weight, "group": self.group, "rows": self.rows, "activations": self.activations}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`: every value that the weight's dtype has (-128 included, NaN excepted), scales over three orders of magnitude."""
        rng = np.random.default_rng(seed)
        blocks = (self.outputs // self.rows, self.features // (self.group or self.features))
        zeros = rng.integers(0, 17, blocks, np.uint8) if self.zeros == "given" else None
        return {
            "x": jnp.asarray(rng.standard_normal((self.tokens, self.features), np.float32).astype(jnp.dtype(self.dtype))),
            "weight": jnp.asarray(self._values(rng)),
            "scales": jnp.asarray((10.0 ** rng.uniform(-4, -1, blocks)).astype(np.float32)),
            "zeros": None if zeros is None else jnp.asarray(zeros),
        }

    def described(self) -> dict[str, Any]:
        """What `make` gives, without its numbers."""
        blocks = (self.outputs // self.rows, self.features // (self.group or self.features))
        stored = self.features // (2 if self.weight == "int4" else 1)
        dtype = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}[self.weight]
        shapes = {"x": ((self.tokens, self.features), self.dtype), "weight": ((self.outputs, stored), dtype)}
        shapes |= {"scales": (blocks, jnp.float32)} | ({"zeros": (blocks, jnp.uint8)} if self.zeros == "given" else {})
        return {"zeros": None} | {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}

    def _values(self, rng: np.random.Generator) -> np.ndarray:
        if self.weight == "int4":
            return rng.integers(0, 256, (self.outputs, self.features // 2), np.uint8)
        found = rng.integers(-128, 128, (self.outputs, self.features), np.int8)
        if self.weight == "int8":
            return found
        found = np.where((found & 0x7F) == 0x7F, np.int8(0), found)  # those bits are NaN
        return found.view(ml_dtypes.float8_e4m3fn)

    def run(self, inputs: dict[str, Any], implementation: str) -> jax.Array:
        """The op on what `make` gave."""
        return quantized_matmul(**inputs, activations=self.activations, implementation=implementation)

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, the products out."""
        given = sum(x.nbytes for x in inputs.values() if x is not None)
        moved = given + self.tokens * self.outputs * jnp.dtype(self.dtype).itemsize
        return Cost(moved, 2 * self.tokens * self.features * self.outputs)


CASES = (
    Case("one", tokens=1, features=96, outputs=200),
    Case("one_narrow", tokens=1, features=1024, outputs=200, dtype="bfloat16"),
    Case("one_half", tokens=1, features=640, outputs=128, dtype="float16", rows=64),
    Case("few", tokens=5, features=384, outputs=64, dtype="bfloat16"),
    Case("tens", tokens=17, features=640, outputs=320, dtype="bfloat16", rows=64),
    Case("many", tokens=70, features=64, outputs=128),
    Case("odd", tokens=3, features=70, outputs=33, weight="int4"),
    Case("grouped", tokens=3, features=256, outputs=192, dtype="bfloat16", weight="int4", group=64),
    Case("zeros", tokens=17, features=384, outputs=64, dtype="bfloat16", weight="int4", group=128, zeros="given"),
    Case("float8", tokens=2, features=256, outputs=64, dtype="bfloat16", weight="fp8"),
    Case("tiles", tokens=2, features=256, outputs=256, weight="fp8", group=128, rows=128),
    Case("both", tokens=6, features=192, outputs=128, activations="int8"),
    Case("both_few", tokens=6, features=256, outputs=128, dtype="bfloat16", activations="int8"),
)

_8B = (("qkv", 4096, 6144), ("out", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
TUNING = (
    Case("demo_one", tokens=1, features=384, outputs=1024),
    *(
        Case(f"8b_{name}_{weight}_{tokens}", tokens, features, outputs, "bfloat16", weight, group=128 if weight == "int4" else 0)
        for name, features, outputs in _8B
        for weight in ("int8", "int4")
        for tokens in (1, 16, 64)
    ),
)
