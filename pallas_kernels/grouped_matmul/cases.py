"""Named shapes of the grouped matmul, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.grouped_matmul.api import grouped_matmul


@dataclass(frozen=True)
class Case:
    """One compiled shape: x [rows, features] times weights [groups, outputs, features].

    rests: "none" where all rows have a group, "some" where the last ones may have none; then groups may be all empty too.
    """

    name: str
    rows: int
    groups: int
    features: int
    outputs: int
    dtype: str = "float32"
    weight: Literal["float", "int8", "float8_e4m3fn"] = "float"
    rests: Literal["none", "some"] = "none"

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("x", "weight", "scales")

    def tuning_key(self) -> dict[str, int | str]:
        """The key that block sizes for this case are looked up by."""
        weight = self.dtype if self.weight == "float" else self.weight
        shape = {"rows": self.rows, "groups": self.groups, "in": self.features, "out": self.outputs}
        return shape | {"dtype": self.dtype, "weight": weight}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`: sizes as uneven as chance has it, some zero."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        share = rng.dirichlet(np.full(self.groups, 0.5))
        taken = self.rows if self.rests == "none" else int(rng.integers(0, self.rows + 1)) * (seed % 5 > 0)
        shape = (self.groups, self.outputs, self.features)
        scales = None if self.weight == "float" else jnp.asarray((10.0 ** rng.uniform(-4, -1, shape[:2])).astype(np.float32))
        return {
            "x": jnp.asarray(rng.standard_normal((self.rows, self.features), np.float32).astype(dtype)),
            "weight": jnp.asarray(self._values(rng, shape)),
            "sizes": jnp.asarray(rng.multinomial(taken, share).astype(np.int32)),
            "scales": scales,
        }

    def described(self) -> dict[str, Any]:
        """What `make` gives, without its numbers; sizes as uneven, and known."""
        rng, shape = np.random.default_rng(0), (self.groups, self.outputs, self.features)
        sizes = rng.multinomial(self.rows, rng.dirichlet(np.full(self.groups, 0.5)))
        return {
            "x": jax.ShapeDtypeStruct((self.rows, self.features), jnp.dtype(self.dtype)),
            "weight": jax.ShapeDtypeStruct(shape, jnp.dtype(str(self.tuning_key()["weight"]))),
            "sizes": jnp.asarray(sizes.astype(np.int32)),
            "scales": None if self.weight == "float" else jax.ShapeDtypeStruct(shape[:2], jnp.float32),
        }

    def _values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if self.weight == "float":
            return rng.standard_normal(shape, np.float32).astype(jnp.dtype(self.dtype))
        found = rng.integers(-128, 128, shape, np.int8)
        if self.weight == "int8":
            return found
        return np.where((found & 0x7F) == 0x7F, np.int8(0), found).view(ml_dtypes.float8_e4m3fn)  # those bits are NaN

    def run(self, inputs: dict[str, Any], implementation: str) -> jax.Array:
        """The op on what `make` gave."""
        return grouped_matmul(**inputs, implementation=implementation)

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: rows of groups in and their products out, weights of groups that have rows once."""
        sizes = np.asarray(inputs["sizes"])
        rows, met = int(sizes.sum()), int((sizes > 0).sum())
        weights = sum(x.nbytes for x in (inputs["weight"], inputs["scales"]) if x is not None) * met // self.groups
        moved = weights + inputs["sizes"].nbytes + rows * (self.features + self.outputs) * jnp.dtype(self.dtype).itemsize
        return Cost(moved, 2 * rows * self.features * self.outputs)


CASES = (
    Case("one", rows=1, groups=3, features=96, outputs=64),
    Case("few", rows=6, groups=4, features=128, outputs=96, dtype="bfloat16"),
    Case("rests", rows=21, groups=5, features=64, outputs=40, rests="some"),
    Case("many", rows=70, groups=3, features=128, outputs=128, rests="some"),
    Case("int8", rows=9, groups=4, features=128, outputs=64, dtype="bfloat16", weight="int8", rests="some"),
    Case("float8", rows=5, groups=2, features=128, outputs=64, weight="float8_e4m3fn"),
)

_8X7B = (("gate_up", 4096, 28672), ("down", 14336, 4096))
TUNING = tuple(
    Case(f"8x7b_{name}_{weight}_{rows}", rows, 8, features, outputs, "bfloat16", weight)
    for name, features, outputs in _8X7B
    for weight in ("float", "int8")
    for rows in (2, 32, 128, 4096)
)
