"""A model without its weights: their names and descriptions in a fixed order, and how flat arrays become a model again.

Only flat arrays cross the compiled boundary: a program takes the tuple `leaves`, and `bind`, inside the trace, builds the Flax modules
around them (about 20 ms for 32 layers, nothing at run time). The order of the leaves is that of the names: the order in which Flax
walks the model's attributes, alphabetical within a module, layers by number; a quantised weight contributes its values, its scales and what
else it has.

A graph knows which weights are quantised and how they would be sharded; it knows no files and holds no arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from jaxinfer.config import ConfigError
from jaxinfer.models.layers import kv_spec
from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import FP8, INT8, PACKED, ZERO, QArray, QSpec
from jaxinfer.quant.rules import KEEP
from jaxinfer.quant.rules import Quantization as Quantization
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, Rules, named, struct
from pallas_kernels import kv_layout

Spec = ArraySpec | QSpec
Weight = Array | QArray
DEVIATIONS = {INT8: 73.0, PACKED: 4.61, FP8: 64.0}  # of random values


@dataclass(frozen=True)
class Graph:
    """The static description of one model in one dtype. Make it with `Graph.of`.

    names: our dotted names. specs: one for each name. contracting: how many trailing dimensions of it a matmul sums over.
    """

    module: ModuleType
    config: Any
    dtype: np.dtype
    names: tuple[str, ...]
    specs: tuple[Spec, ...]
    contracting: tuple[int, ...]

    @classmethod
    def of(cls, module: ModuleType, config: Any, dtype: Any, quantization: Quantization | None = None) -> Graph:
        """Describe `module.Model(config)` with weights and activations in dtype.

        Raises:
            ConfigError: a quantisation rule that matches no weight, or a weight whose shape its scheme does not take.
        """
        found = _parameters(module.Model(config, np.dtype(dtype)))
        if quantization is not None:
            quantization.check([name for name, parameter in found if parameter.contracting])
        specs = tuple(_spec(name, parameter, quantization) for name, parameter in found)
        contracting = tuple(parameter.contracting for _, parameter in found)
        return cls(module, config, np.dtype(dtype), tuple(name for name, _ in found), specs, contracting)

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """What each leaf looks like."""
        return tuple(array for spec in self.specs for array in arrays_of(spec))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights together."""
        return sum(spec.nbytes for spec in self.specs)

    def leaves(self, weights: Mapping[str, Weight]) -> tuple[Array, ...]:
        """The flat arrays of named weights, in the graph's order.

        Raises:
            KeyError: a weight that is not there.
        """
        return tuple(jax.tree.leaves([weights[name] for name in self.names]))

    def weights(self, leaves: Sequence[Array]) -> dict[str, Weight]:
        """The inverse of `leaves`.

        Raises:
            ValueError: another number of leaves than the graph has.
        """
        if len(leaves) != len(self.arrays):
            raise ValueError(f"the model has {len(self.arrays)} arrays, found {len(leaves)}")
        rest = iter(leaves)
        return {
            name: spec.make([next(rest) for _ in spec.arrays]) if isinstance(spec, QSpec) else next(rest)
            for name, spec in zip(self.names, self.specs, strict=True)
        }

    def bind(self, leaves: Sequence[Array], wrap: Callable[[str, Weight], Any] | None = None) -> nnx.Module:
        """The model with these arrays as its weights, each as `wrap` gives it back; for use inside a trace."""
        model = self.module.Model(self.config, self.dtype)
        weights = self.weights(leaves)
        for name, parameter in _parameters(model):
            parameter.set_value(weights[name] if wrap is None else wrap(name, weights[name]))
        return model

    def structs(self, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What ahead-of-time lowering takes in place of `leaves`."""
        return tuple(struct(array, mesh, rules) for array in self.arrays)

    def kv_specs(self, pages: int, page_size: int, *, implementation: str = "auto", codes: str | None = None) -> tuple[Any, ...]:
        """Each layer's pool of `pages` pages (of all replicas together), in the layout that the attention implementation wants.

        An ArraySpec for each layer, or for each array of a quantised pool with codes of the dtype `codes`: go through them with jax.tree.
        """
        layouts = [
            kv_layout(implementation, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=self.dtype, kv_dtype=codes)
            for shape in self.config.attention_shapes
        ]
        pools = tuple(jax.tree.map(lambda array: kv_spec(array, pages, page_size), layout) for layout in layouts)
        kept = ArraySpec((pages, page_size, self.config.hidden_size), self.dtype, ("pages", None, "embed"))
        return (*pools, kept) if self.tapped else pools

    @property
    def tapped(self) -> tuple[int, ...]:
        """Where a head taps its target (see `residual.through`); () for a model that stands alone. The features of every token that a head
        has seen are kept in a pool behind those of its layers: a token's own follow from the features of the one before."""
        return getattr(self.config, "tapped", ())


def arrays_of(spec: Spec) -> tuple[ArraySpec, ...]:
    """The arrays that hold one weight, in the order of its leaves."""
    return spec.arrays if isinstance(spec, QSpec) else (spec,)


def check_experts(spec: QSpec) -> None:
    """Test that there is arithmetic for a quantised weight, if it is one of experts: 8 bits and a scale for each output channel.

    Raises:
        ConfigError: there is none.
    """
    values = spec.values
    if "experts" not in values.axes:
        return
    rows = spec.scales.shape == (*values.shape[:-1], 1)
    extras = (spec.zeros, spec.smooth, spec.order)
    if values.dtype == PACKED or not rows or any(it is not None for it in extras) or spec.activations != "float":
        raise ConfigError(f"{spec.scheme} is not implemented for the experts of a mixture, int8 and fp8 with a scale for each row are")


def random_weights(graph: Graph, seed: int, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> dict[str, Weight]:
    """Made-up weights of the right size for benchmarks and tests, made on the devices: matrices keep the magnitude of what they
    multiply, norms are 1, biases 0, quantised weights random bytes under a constant scale. They depend on the seed, not on the mesh.
    """
    fillers, made = {}, []
    for name, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        for recipe in _recipes(name, spec, contracting):
            if recipe not in fillers:
                fillers[recipe] = jax.jit(recipe.fill, out_shardings=named(recipe.array, mesh, rules))
            made.append(fillers[recipe](np.uint32((seed * 65_537 + len(made)) % 2**32)))
    return graph.weights(made)


class _Recipe(NamedTuple):
    """How one array of random weights is made: constant `size`, uniform with deviation `size`, random bytes, or each element's place."""

    array: ArraySpec
    kind: Literal["constant", "uniform", "bytes", "places"]
    size: float = 0.0

    def fill(self, seed: UInt32[Array, ""]) -> Array:
        """The numbers themselves: a hash of each element's place, which compiles in a fraction of what jax.random takes."""
        shape, dtype = self.array.shape, self.array.dtype
        if self.kind == "constant":
            return jnp.full(shape, self.size, dtype)
        if self.kind == "places":
            return jnp.arange(shape[0], dtype=dtype)
        bits = _scrambled(shape, seed)
        if self.kind == "bytes":
            found = (bits >> 24).astype(jnp.uint8)
            return found if dtype == PACKED else jnp.maximum(found.astype(jnp.int8), jnp.int8(-127))
        unit = (bits >> 8).astype(jnp.float32) * (2.0**-23) - 1.0
        return (unit * (self.size * math.sqrt(3.0))).astype(dtype)


def _scrambled(shape: tuple[int, ...], seed: UInt32[Array, ""]) -> UInt32[Array, "..."]:
    """32 hashed bits for each place of an array (the mixing function lowbias32 of Wellons' hash prospector)."""
    place = jnp.full(shape, seed * np.uint32(0x9E3779B9))
    for axis in range(len(shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    return place ^ (place >> 16)


def _recipes(name: str, spec: Spec, contracting: int) -> tuple[_Recipe, ...]:
    if isinstance(spec, QSpec):
        deviation = math.prod(spec.shape[-contracting:]) ** -0.5
        kind, size = ("uniform", 64.0) if spec.values.dtype == FP8 else ("bytes", 1.0)
        made = [_Recipe(spec.values, kind, size), _Recipe(spec.scales, "constant", deviation / DEVIATIONS[spec.values.dtype])]
        made += [_Recipe(spec.zeros, "constant", ZERO)] if spec.zeros is not None else []
        made += [_Recipe(spec.smooth, "constant", 1.0)] if spec.smooth is not None else []
        return (*made, _Recipe(spec.order, "places")) if spec.order is not None else tuple(made)
    if len(spec.shape) == 1 or name.endswith(".bias"):
        return (_Recipe(spec, "constant", 0.0 if name.endswith(".bias") or spec.dtype.kind == "i" else 1.0),)
    return (_Recipe(spec, "uniform", math.prod(spec.shape[-max(contracting, 1) :]) ** -0.5),)


def _parameters(model: nnx.Module) -> list[tuple[str, nnx.Param[Any]]]:
    found: Iterable[tuple[tuple[Any, ...], Any]] = nnx.iter_graph(model)
    return [(".".join(str(part) for part in path), node) for path, node in found if isinstance(node, nnx.Param)]


def _spec(name: str, parameter: nnx.Param[Any], quantization: Quantization | None) -> Spec:
    scheme = KEEP if quantization is None or not parameter.contracting else quantization.scheme_of(name)
    if scheme == KEEP:
        return parameter.spec
    try:
        spec = find_scheme(scheme).describe(parameter.spec, parameter.contracting)
        check_experts(spec)
        return spec
    except ConfigError as error:
        raise ConfigError(f"--quantize: {error} ({name}=keep)") from None
