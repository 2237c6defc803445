"""The residual stream on its way through the layers, each of which normalises it and then adds to it.

What a layer's last part adds is not added there but by the norm that comes next, in the next layer or after the last: where tokens are few
the sum and its norm are one kernel. Nor need a layer's last matmuls be done there: it may say which they are (`Link`), and where there are
few tokens they and the first matmul of the next layer are one kernel; where there are many and inputs are int8, what is between two matmuls
is. So a layer takes and returns a `Stream`. This file does not know what layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxinfer.models.layers import Placement, Projection, RMSNorm, StepContext, gated
from jaxinfer.quant.matmul import Rows, rows_of
from jaxinfer.sharding import constrain, partition
from pallas_kernels import Chained, Form, Normed, Pool, Weight, dispatch, joins, residual_norm, token_chain


class Link(NamedTuple):
    """A matmul that is still to be done: with a norm, of the residual stream after what comes before was added to it; gate: the
    activation of the result's first half, which the second half is multiplied by."""

    projection: Projection
    norm: RMSNorm | None = None
    gate: Callable[[Array], Array] | None = None


class Projected(NamedTuple):
    """The product of the normed stream, and the stream that it was made of."""

    value: Array
    stream: Stream


class Stream(NamedTuple):
    """The residual stream: what it holds, and what is still to be added to it (None: nothing), once `links` have made that of `added`.

    counters: see `StepContext`.
    """

    held: Float[Array, "tokens embed"]
    added: Float[Array, "tokens *into"] | None = None
    links: tuple[Link, ...] = ()
    counters: Any = None

    def then(self, *links: Link, of: Float[Array, "tokens *into"] | None = None) -> Stream:
        """With more matmuls behind those that there are; of: what the first one multiplies, where there are none."""
        return self._replace(added=self.added if of is None else of, links=(*self.links, *links))

    def normed(self, norm: RMSNorm, placement: Placement) -> Normed:
        """The sum (`total`) and its norm (`normed`)."""
        if self.links:
            return self.settled(placement).normed(norm, placement)
        return _normed(self.held, self.added, norm, placement)

    def projected(self, norm: RMSNorm, projection: Projection, placement: Placement) -> Projected:
        """A projection of the norm of the sum."""
        found = _together(self.then(Link(projection, norm)), placement) if self.links else None
        if found is not None and found.added is not None:
            return Projected(found.added, Stream(found.held, counters=self.counters))
        normed = self.normed(norm, placement)
        return Projected(projection(normed.normed, placement), Stream(normed.total, counters=self.counters))

    def settled(self, placement: Placement) -> Stream:
        """The same stream with no matmul to be done."""
        if not self.links:
            return self
        return _together(self, placement) or _one_by_one(self, placement)

    def total(self, placement: Placement) -> Float[Array, "tokens embed"]:
        """The sum alone."""
        settled = self.settled(placement)
        if settled.added is None:
            return settled.held
        return constrain(settled.held + settled.added, ("tokens", "embed"), placement.mesh, placement.rules)


def _normed(held: Float[Array, "tokens embed"], added: Float[Array, "tokens embed"] | None, norm: RMSNorm, placement: Placement) -> Normed:
    """On several devices a kernel has each one's own tokens, XLA is told how they lie."""
    mesh, given = placement.mesh, (held, added, norm.weight.get_value())
    run = partial(residual_norm, epsilon=norm.epsilon, offset=norm.offset, implementation=placement.implementation)
    if mesh.size == 1:
        return run(*given)
    known: dispatch.Key = {"features": held.shape[1], "dtype": held.dtype.name}
    if dispatch.choose("residual_norm", placement.implementation, dispatch.target(), known) in ("xla", "reference"):
        total = Stream(held, added).total(placement)
        return Normed(norm(total), total)
    rows = partition(held.shape, ("tokens", None), mesh, placement.rules)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=False)
    return sharded(*given)


def _one_by_one(stream: Stream, placement: Placement) -> Stream:
    held, value, links, counters = stream
    for projection, norm, gate in links:
        if norm is not None:
            value, held = _normed(held, value, norm, placement)
        value = projection(value, placement)
        value = value if gate is None else gated(value, gate)
    return Stream(held, value, counters=counters)


def _together(stream: Stream, placement: Placement) -> Stream | None:
    """What comes of a stream's links if there are kernels that know several: on one device, SwiGLU, no biases, weights all alike."""
    x, links = stream.added, stream.links
    projections = [link.projection for link in links]
    rows = [rows_of(each.weight.get_value(), each.weight.contracting) for each in projections]
    whole = [each for each in rows if each is not None]
    plain = all(link.projection.bias is None and link.gate in (None, jax.nn.silu) for link in links)
    if x is None or placement.mesh.size > 1 or not plain or len(whole) < len(rows):
        return None
    found = _chained(x.reshape(x.shape[0], -1), stream, whole, placement.implementation)
    if found is None:
        return None
    out = projections[-1].weight.spec.shape[: -projections[-1].weight.contracting]
    return Stream(found.total, found.out.reshape(x.shape[0], *out), counters=stream.counters)


def _chained(x: Float[Array, "tokens in"], stream: Stream, rows: Sequence[Rows], implementation: str) -> Chained | None:
    """Inputs as they are need counters, without which nothing keeps two such kernels of a program apart."""
    weights, activations = [Weight(each.values, each.scales, each.smooth) for each in rows], rows[0].activations
    bare = all(weight.smooth is None for weight in weights)
    ready = activations == "int8" or (bare and stream.counters is not None)
    if any(each.activations != activations for each in rows) or not ready or not joins(x, weights, activations, implementation):
        return None
    norms = [None if link.norm is None else link.norm.weight.get_value() for link in stream.links]
    settings = {"activations": activations, "counters": stream.counters, "implementation": implementation}
    return token_chain(x, stream.held, weights, norms, forms=tuple(map(_form, stream.links)), **settings)


def _form(link: Link) -> Form:
    norm = link.norm
    return Form(link.gate is not None) if norm is None else Form(link.gate is not None, norm.epsilon, norm.offset)


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
    pools, placement, stream, tapped = [], context.placement, Stream(x, counters=context.counters), {}
    for number, (layer, pool) in enumerate(zip(layers, kv, strict=True)):
        stream = stream.settled(placement) if number in context.tapped else stream
        tapped[number] = stream
        result = layer(stream, pool, context)
        stream = result.stream
        pools.append(result.kv)
    stream = stream.settled(placement)
    tapped[len(pools)] = stream
    sums = [tapped[number].total(placement) for number in context.tapped]
    features = jnp.concatenate(sums, axis=-1) if sums else None
    return ModelOutput(stream.normed(norm, placement).normed, tuple(pools), features)
