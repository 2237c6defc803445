"""The residual stream on its way through the layers, each of which normalises it and then adds to it.

What a layer's last part adds is not added there but by the norm that comes next, in the next layer or after the last: where tokens are few
the sum and its norm are one kernel. So a layer takes and returns a `Stream`. This file does not know what layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxinfer.models.layers import Placement, RMSNorm, StepContext
from jaxinfer.sharding import constrain, partition
from pallas_kernels import Normed, Pool, dispatch, residual_norm


class Stream(NamedTuple):
    """The residual stream: what it holds, and what is still to be added to it (None: nothing)."""

    held: Float[Array, "tokens embed"]
    added: Float[Array, "tokens embed"] | None = None

    def normed(self, norm: RMSNorm, placement: Placement) -> Normed:
        """The sum (`total`) and its norm (`normed`). On several devices a kernel has each one's own tokens, XLA is told how they lie."""
        mesh, given = placement.mesh, (self.held, self.added, norm.weight.get_value())
        run = partial(residual_norm, epsilon=norm.epsilon, offset=norm.offset, implementation=placement.implementation)
        if mesh.size == 1:
            return run(*given)
        known: dispatch.Key = {"features": self.held.shape[1], "dtype": self.held.dtype.name}
        if dispatch.choose("residual_norm", placement.implementation, dispatch.target(), known) in ("xla", "reference"):
            total = self.total(placement)
            return Normed(norm(total), total)
        rows = partition(self.held.shape, ("tokens", None), mesh, placement.rules)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=False)
        return sharded(*given)

    def total(self, placement: Placement) -> Float[Array, "tokens embed"]:
        """The sum alone."""
        if self.added is None:
            return self.held
        return constrain(self.held + self.added, ("tokens", "embed"), placement.mesh, placement.rules)


class LayerResult(NamedTuple):
    """The residual stream after a whole layer, and the layer's pool with this step's keys and values."""

    stream: Stream
    kv: Pool


class ModelOutput(NamedTuple):
    """Hidden states after the final norm, each layer's pool with this step's keys and values, and features if they were asked for."""

    hidden: Float[Array, "tokens embed"]
    kv: tuple[Pool, ...]
    features: Float[Array, "tokens features"] | None = None


def through(layers: Any, x: Float[Array, "tokens embed"], kv: Sequence[Pool], context: StepContext, *, norm: RMSNorm) -> ModelOutput:
    """Token vectors through all layers, each of which is called as layer(stream, pool, context) -> LayerResult, and the final norm.

    A model file that runs its layers through here and hands `features` on can be the target of a head (`eagle.py`): they are the residual
    stream before each layer whose number is in `context.tapped` (the number of layers: after the last), side by side.
    """
    pools, streams, placement = [], [Stream(x)], context.placement
    for layer, pool in zip(layers, kv, strict=True):
        result = layer(streams[-1], pool, context)
        streams.append(result.stream)
        pools.append(result.kv)
    tapped = [streams[number].total(placement) for number in context.tapped]
    features = jnp.concatenate(tapped, axis=-1) if tapped else None
    return ModelOutput(streams[-1].normed(norm, placement).normed, tuple(pools), features)
