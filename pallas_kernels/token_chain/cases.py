"""Named shapes of chains, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.token_chain.api import token_chain
from pallas_kernels.token_chain.reference import Form


@dataclass(frozen=True)
class Part:
    """A link: its matmul's outputs (of a gated one both halves), whether a norm comes before."""

    outputs: int
    normed: bool = False
    gated: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Case:
    """One compiled chain from [1, inputs] on, beside a residual stream of `features`."""

    name: str
    inputs: int
    features: int
    parts: tuple[Part, ...]
    dtype: str = "bfloat16"
    weight: str = "int8"
    slack: float = 4e-3  # each link rounds what the next one reads

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("weights", "scales", "norms")

    @property
    def forms(self) -> tuple[Form, ...]:
        """What is static of the links."""
        return tuple(Form(part.gated, 1e-5, part.offset) for part in self.parts)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of the weights."""
        widths = [self.inputs, *(part.outputs // (2 if part.gated else 1) for part in self.parts)]
        return tuple((part.outputs, width) for part, width in zip(self.parts, widths, strict=False))

    def tuning_key(self) -> dict[str, int | str]:
        """What there is to know of the case."""
        shapes = {f"{name}{n}": size for n, shape in enumerate(self.shapes) for name, size in zip(("out", "in"), shape, strict=True)}
        kind = "int8" if self.weight == "int8" else self.dtype
        return {"tokens": 1, "dtype": self.dtype, "weight": kind, "links": len(self.parts)} | shapes

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`: weights that leave numbers about as large as they come; outliers in the token."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        x = rng.standard_normal((1, self.inputs)) * np.where(rng.random((1, self.inputs)) < 0.02, 30, 1)
        plain, coded = [], []
        for outputs, inputs in self.shapes:
            plain.append(rng.standard_normal((outputs, inputs), np.float32) * np.float32(inputs**-0.5))
            scales = np.abs(plain[-1]).max(axis=1, keepdims=True) / 127
            coded.append((np.rint(plain[-1] / scales).astype(np.int8), scales))
        norms = [rng.standard_normal(self.features).astype(dtype) if part.normed else None for part in self.parts]
        int8 = self.weight == "int8"
        made = {
            "x": x.astype(dtype),
            "held": rng.standard_normal((1, self.features)).astype(dtype),
            "weights": [values for values, _ in coded] if int8 else [values.astype(dtype) for values in plain],
            "scales": [scales if int8 else None for _, scales in coded],
            "norms": norms,
        }
        return jax.tree.map(jnp.asarray, made)

    def described(self) -> dict[str, Any]:
        """What `make` gives, without its numbers."""
        shaped, int8 = jax.ShapeDtypeStruct, self.weight == "int8"
        return {
            "x": shaped((1, self.inputs), self.dtype),
            "held": shaped((1, self.features), self.dtype),
            "weights": [shaped(shape, "int8" if int8 else self.dtype) for shape in self.shapes],
            "scales": [shaped((outputs, 1), "float32") if int8 else None for outputs, _ in self.shapes],
            "norms": [shaped((self.features,), self.dtype) if part.normed else None for part in self.parts],
        }

    def run(self, inputs: dict[str, Any], implementation: str) -> tuple[jax.Array, jax.Array]:
        """The op on what `make` gave: result and residual stream."""
        found = token_chain(**inputs, forms=self.forms, implementation=implementation)
        return found.out, found.total

    def counted(self, inputs: dict[str, Any], counters: Any) -> dict[str, Any]:
        """Inputs with a program's counters."""
        return inputs | {"counters": counters}

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, result and stream out."""
        given = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs))
        size = jnp.dtype(self.dtype).itemsize
        last = self.parts[-1]
        moved = given + (last.outputs // (2 if last.gated else 1) + self.features) * size
        return Cost(moved, 2 * sum(outputs * width for outputs, width in self.shapes))

    def canonical(self, total: Any, implementation: str) -> np.ndarray:
        """The residual stream, for comparison, behind a place that is not compared."""
        return np.concatenate([np.zeros(1), np.asarray(total, np.float64).ravel()])


def layer(features: int, mlp: int, qkv: int) -> tuple[Part, ...]:
    """What a Llama layer does behind its attention, and the next one's first matmul."""
    return (Part(features), Part(2 * mlp, normed=True, gated=True), Part(features), Part(qkv, normed=True))


CASES = (
    Case("layer", 128, 256, layer(256, 384, 512)),
    Case("layer_plain", 128, 256, layer(256, 384, 512), dtype="float16", weight="plain", slack=1e-3),
    Case("last", 384, 128, layer(128, 128, 0)[:3]),
    Case("offset", 128, 128, (Part(192, normed=True, offset=1.0),), dtype="float16", slack=0.0),
    Case("gated", 640, 384, (Part(224, gated=True),), weight="plain"),
)

TUNING = (
    Case("8b_int8", 4096, 4096, layer(4096, 14336, 6144)),
    Case("8b_bfloat16", 4096, 4096, layer(4096, 14336, 6144), weight="plain"),
)
