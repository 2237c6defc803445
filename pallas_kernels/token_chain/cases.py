"""Named shapes of chains, shared by the contract test, the benchmarks and the tuner; `make` fills one with data."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.costs import Cost
from pallas_kernels.token_chain.api import token_chain
from pallas_kernels.token_chain.reference import Form, Weight


@dataclass(frozen=True)
class Part:
    """A link: its matmul's outputs (of a gated one both halves), whether a norm comes before."""

    outputs: int
    normed: bool = False
    gated: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Case:
    """One compiled chain from [tokens, inputs] on, beside a residual stream of `features`; smooth: a factor for every input."""

    name: str
    inputs: int
    features: int
    parts: tuple[Part, ...]
    dtype: str = "bfloat16"
    weight: str = "int8"
    slack: float = 4e-3  # each link rounds what the next one reads
    tokens: int = 1
    activations: Literal["float", "int8"] = "float"
    smooth: bool = False

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("weights", "norms")

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
        known = {"tokens": self.tokens, "dtype": self.dtype, "weight": kind, "activations": self.activations}
        return known | {"links": len(self.parts)} | shapes

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`: weights that leave numbers about as large as they come; outliers in a token; tokens of very different sizes,
        one of several of zeros alone."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        x = rng.standard_normal((self.tokens, self.inputs)) * np.where(rng.random((1, self.inputs)) < 0.02, 30, 1)
        sizes = np.exp2(rng.integers(-4, 5, (self.tokens, 1))) * (np.arange(self.tokens)[:, None] != 3) if self.tokens > 1 else 1.0
        weights: list[Any] = []
        for outputs, inputs in self.shapes:
            plain = rng.standard_normal((outputs, inputs), np.float32) * np.float32(inputs**-0.5)
            scales = np.abs(plain).max(axis=1, keepdims=True) / 127
            given = (np.rint(plain / scales).astype(np.int8), scales) if self.weight == "int8" else (plain.astype(dtype),)
            weights.append(Weight._make((*given, None, None)[:3]))
        made = {
            "x": (x * sizes).astype(dtype),
            "held": (sizes * rng.standard_normal((self.tokens, self.features))).astype(dtype),
            "weights": weights,
            "norms": [rng.standard_normal(self.features).astype(dtype) if part.normed else None for part in self.parts],
        }
        if self.smooth:
            made["weights"] = [each._replace(smooth=np.exp2(rng.uniform(-1, 1, each.values.shape[1]))) for each in weights]
        return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else None), made)

    def described(self) -> dict[str, Any]:
        """What `make` gives, without its numbers."""
        shaped: Any = jax.ShapeDtypeStruct
        int8 = self.weight == "int8"
        return {
            "x": shaped((self.tokens, self.inputs), self.dtype),
            "held": shaped((self.tokens, self.features), self.dtype),
            "weights": [
                Weight(
                    shaped((outputs, inputs), "int8" if int8 else self.dtype),
                    shaped((outputs, 1), "float32") if int8 else None,
                    shaped((inputs,), "float32") if self.smooth else None,
                )
                for outputs, inputs in self.shapes
            ],
            "norms": [shaped((self.features,), self.dtype) if part.normed else None for part in self.parts],
        }

    def run(self, inputs: dict[str, Any], implementation: str) -> tuple[jax.Array, jax.Array]:
        """The op on what `make` gave: result and residual stream."""
        found = token_chain(**inputs, forms=self.forms, activations=self.activations, implementation=implementation)
        return found.out, found.total

    def counted(self, inputs: dict[str, Any], counters: Any) -> dict[str, Any]:
        """Inputs with a program's counters."""
        return inputs | {"counters": counters}

    def cost(self, inputs: dict[str, Any]) -> Cost:
        """What the op must do on what `make` gave: everything in, result and stream out."""
        given = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs))
        size = jnp.dtype(self.dtype).itemsize
        last = self.parts[-1]
        moved = given + self.tokens * (last.outputs // (2 if last.gated else 1) + self.features) * size
        return Cost(moved, 2 * self.tokens * sum(outputs * width for outputs, width in self.shapes))

    def canonical(self, total: Any, implementation: str) -> np.ndarray:
        """The residual stream, for comparison, behind a place that is not compared."""
        return np.concatenate([np.zeros(1), np.asarray(total, np.float64).ravel()])


def layer(features: int, mlp: int, qkv: int) -> tuple[Part, ...]:
    """What a Llama layer does behind its attention, and the next one's first matmul."""
    return (Part(features), Part(2 * mlp, normed=True, gated=True), Part(features), Part(qkv, normed=True))


_rounded = partial(Case, activations="int8", slack=2.5e-2)  # a number that was rounded elsewhere in x's dtype may be another int8 number

CASES = (
    Case("layer", 128, 256, layer(256, 384, 512)),
    Case("layer_plain", 128, 256, layer(256, 384, 512), dtype="float16", weight="plain", slack=1e-3),
    Case("last", 384, 128, layer(128, 128, 0)[:3]),
    Case("offset", 128, 128, (Part(192, normed=True, offset=1.0),), dtype="float16", slack=0.0),
    Case("gated", 640, 384, (Part(224, gated=True),), weight="plain"),
    Case("few", 256, 256, layer(256, 384, 512), weight="plain", tokens=5),
    Case("few_last", 512, 256, layer(256, 256, 0)[:3], weight="plain", tokens=16),
    Case("few_offset", 256, 128, (Part(128), Part(192, normed=True, offset=1.0)), weight="plain", tokens=9),
    Case("few_int8", 256, 256, layer(256, 512, 512), tokens=7),
    Case("few_int8_last", 512, 256, layer(256, 256, 0)[:3], tokens=12),
    Case("few_norm_first", 128, 128, (Part(192, normed=True, offset=1.0),), weight="plain", tokens=3),
    Case("few_gated_first", 128, 256, (Part(512, gated=True), Part(256, normed=True)), weight="plain", tokens=8),
    Case("tens", 256, 128, layer(128, 256, 256), weight="plain", tokens=19),
    Case("tens_thin", 1024, 64, (Part(64), Part(96, normed=True)), weight="plain", tokens=48),
    Case("tens_last", 512, 256, layer(256, 256, 0)[:3], weight="plain", tokens=64),
    Case("tens_offset", 192, 128, (Part(128), Part(192, normed=True, offset=1.0)), weight="plain", tokens=40),
    Case("tens_norm_first", 128, 128, (Part(192, normed=True, offset=1.0),), weight="plain", tokens=17),
    Case("tens_gated_first", 128, 256, (Part(512, gated=True), Part(256, normed=True)), weight="plain", tokens=33),
    _rounded("many", 128, 256, layer(256, 384, 512), tokens=70),
    _rounded("many_smooth", 128, 256, layer(256, 384, 512), tokens=9, smooth=True),
    _rounded("many_last", 384, 128, layer(128, 128, 0)[:3], tokens=5, dtype="float16"),
    _rounded("many_offset", 640, 640, (Part(192, normed=True, offset=1.0),), tokens=6),
    _rounded("many_gated", 256, 384, (Part(768, gated=True),), tokens=3),
    _rounded("none", 128, 128, (Part(128, normed=True),), tokens=0),
)

TUNING = (
    Case("8b_int8", 4096, 4096, layer(4096, 14336, 6144)),
    Case("8b_bfloat16", 4096, 4096, layer(4096, 14336, 6144), weight="plain"),
    *(Case(f"8b_bfloat16_{tokens}", 4096, 4096, layer(4096, 14336, 6144), weight="plain", tokens=tokens) for tokens in (8, 16, 32, 64)),
    Case("1b_bfloat16_40", 2048, 2048, layer(2048, 8192, 3072), weight="plain", tokens=40),
    *(Case(f"8b_int8_{tokens}", 4096, 4096, layer(4096, 14336, 6144), tokens=tokens) for tokens in (8, 16)),
    *(_rounded(f"8b_{tokens}", 4096, 4096, layer(4096, 14336, 6144), tokens=tokens) for tokens in (512, 2048, 8192)),
)
