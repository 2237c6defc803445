"""Named shapes of the sum and its norm, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.residual_norm.api import residual_norm
from pallas_kernels.residual_norm.reference import Normed


@dataclass(frozen=True)
class Case:
    """One compiled shape: x and what is added ("given" or "nothing"), both [tokens, features]."""

    name: str
    tokens: int
    features: int
    dtype: str = "bfloat16"
    added: str = "given"
    offset: float = 0.0
    epsilon: float = 1e-5

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("x", "weight")

    def tuning_key(self) -> dict[str, int | str]:
        """What there is to know of the case."""
        return {"tokens": self.tokens, "features": self.features, "dtype": self.dtype, "added": self.added}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`; tokens are of very different sizes."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        sizes = np.exp2(rng.integers(-4, 5, (self.tokens, 1))).astype(np.float32)
        x, added = (sizes * rng.standard_normal((self.tokens, self.features), np.float32) for _ in range(2))
        given = {"x": x, "weight": rng.standard_normal(self.features, np.float32)} | ({"added": added} if self.added == "given" else {})
        return {name: jnp.asarray(value.astype(dtype)) for name, value in given.items()}

    def run(self, inputs: dict[str, Any], implementation: str) -> Normed:
        """The op on what `make` gave."""
        x, added, weight = inputs["x"], inputs.get("added"), inputs["weight"]
        return residual_norm(x, added, weight, epsilon=self.epsilon, offset=self.offset, implementation=implementation)

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, the norm and the sum, if there is one, out."""
        moved = sum(x.nbytes for x in inputs.values()) + (1 + ("added" in inputs)) * inputs["x"].nbytes
        return Cost(moved, 5 * self.tokens * self.features)

    def canonical(self, total: Any, implementation: str) -> np.ndarray:
        """The sum, for comparison."""
        return np.asarray(total, np.float64)


CASES = (
    Case("one", tokens=1, features=256),
    Case("half", tokens=1, features=384, dtype="float16", offset=1.0),
    Case("alone", tokens=1, features=1024, added="nothing"),
    Case("none", tokens=0, features=128),
    Case("many", tokens=70, features=128, offset=1.0),
    Case("odd", tokens=7, features=100, dtype="float32"),
)

TUNING = tuple(Case(f"{name}_{tokens}", tokens, features) for name, features in (("8b", 4096), ("1b", 2048)) for tokens in (1, 4, 8, 16))
