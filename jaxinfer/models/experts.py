"""A mixture of experts in place of an MLP: each token goes through the few experts that its router chooses (arXiv 2401.04088).

Experts lie in one weight along the logical axis "experts", and every device holds its share of each expert's `mlp` features: tensor
parallelism inside the experts, one all-reduce as after a dense MLP. Each device sorts its own tokens by expert, so that a grouped matmul
reads the weights of experts that were chosen and no others. Padding is sent to none. Also says what share of a weight some tokens meet
(`share_met`, `share_used`), for whoever counts bytes and operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxinfer.models.layers import Dim, StepContext, describe, project
from jaxinfer.quant.matmul import Weight, grouped, partitions
from jaxinfer.sharding import ArraySpec, partition

AXIS = "experts"


class ExpertShape(NamedTuple):
    """How many experts there are, and how many of them a token goes through."""

    total: int
    per_token: int


class Routed(NamedTuple):
    """The experts of each token and their shares, which add up to 1. An expert that does not exist (`total`) is none."""

    experts: Int32[Array, "tokens chosen"]
    shares: Float[Array, "tokens chosen"]


class Described(nnx.Module):
    """A weight with no arithmetic of its own."""

    def __init__(self, dims: Sequence[Dim], dtype: np.dtype, *, contracting: int = 0) -> None:
        self.weight = describe(dims, dtype, contracting=contracting)


class Experts(nnx.Module):
    """SwiGLU experts: the sum over a token's experts of share * down(silu(gate(x)) * up(x)). The router is never quantised."""

    def __init__(self, embed: int, mlp: int, shape: ExpertShape, dtype: np.dtype) -> None:
        experts, features, inner = Dim(shape.total, AXIS), Dim(embed, "embed"), Dim(mlp, "mlp")
        self.router = Described([Dim(shape.total), features], dtype)
        self.gate_up = Described([experts, Dim(2), inner, features], dtype, contracting=1)
        self.down = Described([experts, features, inner], dtype, contracting=1)
        self.shape = shape

    def __call__(self, x: Float[Array, "tokens embed"], context: StepContext) -> Float[Array, "tokens embed"]:
        """The experts' contribution to the residual stream."""
        placement = context.placement
        routed = self.route(x, context)
        weights: tuple[Weight, ...] = (self.gate_up.weight.get_value(), self.down.weight.get_value())
        if placement.mesh.size == 1:
            return through(x, routed, *weights, implementation=placement.implementation)
        axes = (self.gate_up.weight.spec.axes, self.down.weight.spec.axes)
        parts = [partitions(weight, of, placement.mesh, placement.rules, contracting=1) for weight, of in zip(weights, axes, strict=True)]
        inner, sharded = parts[1].dims[-1], placement.mesh.shape
        if parts[0].dims[2] != inner:
            raise ValueError(f"experts' mlp is sharded over {parts[0].dims[2]} on its way in and over {inner} on its way out")

        def local(x: Array, routed: Routed, gate_up: Weight, down: Weight) -> Array:
            out = through(x, routed, gate_up, down, implementation=placement.implementation)
            return jax.lax.psum(out, inner) if inner is not None and sharded[inner] > 1 else out

        tokens = PartitionSpec(*partition(x.shape[:1], ("tokens",), placement.mesh, placement.rules))
        inputs = (tokens, tokens, parts[0].specs, parts[1].specs)
        return jax.shard_map(local, mesh=placement.mesh, in_specs=inputs, out_specs=tokens, check_vma=False)(x, routed, *weights)

    def route(self, x: Float[Array, "tokens embed"], context: StepContext) -> Routed:
        """The best experts of each token, their scores' softmax among themselves in float32."""
        scores = project(x, self.router.weight, context.placement, out_dtype=np.dtype(np.float32))
        best, chosen = jax.lax.top_k(scores, self.shape.per_token)
        real = (context.positions >= 0)[:, None]
        return Routed(jnp.where(real, chosen, self.shape.total), jax.nn.softmax(best, axis=-1))


def through(
    x: Float[Array, "tokens embed"], routed: Routed, gate_up: Weight, down: Weight, *, implementation: str = "auto"
) -> Float[Array, "tokens embed"]:
    """All tokens through their experts on one device; gate_up [experts, 2, mlp, embed] and down [experts, embed, mlp] or shards of mlp."""
    chosen = routed.experts.shape[1]
    experts = routed.experts.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.sum(experts[:, None] == jnp.arange(gate_up.shape[0], dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    both = grouped(x[order // chosen], gate_up, sizes, out_dtype=x.dtype, implementation=implementation)
    products = grouped(jax.nn.silu(both[:, 0]) * both[:, 1], down, sizes, out_dtype=np.dtype(np.float32), implementation=implementation)
    by_token = products[jnp.argsort(order)].reshape(x.shape[0], chosen, -1)
    return jnp.sum(by_token * routed.shares[..., None], axis=1).astype(x.dtype)


def share_met(array: ArraySpec, config: Any, tokens: float) -> float:
    """The share of a weight's array that so many tokens read, if experts are chosen evenly and independently; 1 for all but experts."""
    return 1.0 - (1.0 - share_used(array, config)) ** tokens if AXIS in array.axes else 1.0


def share_used(array: ArraySpec, config: Any) -> float:
    """The share of a weight's array that one token is multiplied with: 1 for all but experts."""
    if AXIS not in array.axes:
        return 1.0
    shape: ExpertShape = config.experts
    return shape.per_token / shape.total
