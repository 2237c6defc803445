"""The one matmul of activations with weights: picks the arithmetic by what the weight is, so that model files need not know.

Weights are [out.., into..] and every device multiplies its own shard of one as a plain matrix [out, into]: a dot over several
dimensions would be transposed first by XLA (the whole weight, every step, on CPUs). On a mesh this happens inside shard_map, where
merging dimensions is local whatever is sharded, kernels see ordinary arrays, and the only communication is the one sum over shards of
the contracted dimensions. Activations that are quantised on arrival are so by each device for the inputs it has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32, Shaped

from jaxinfer.quant import blocks
from jaxinfer.quant.observe import Observed
from jaxinfer.quant.qarray import INT8, QArray
from jaxinfer.sharding import Axes, Rules, partition
from pallas_kernels import dense_matmul, grouped_matmul, quantized_matmul

Weight = Array | QArray


def matmul(
    x: Float[Array, "tokens *into"], weight: Weight, *, out_dtype: np.dtype, implementation: str = "auto"
) -> Float[Array, "tokens *out"]:
    """Sum x over its dimensions after the first against the weight's trailing ones; float32 accumulation, result in out_dtype."""
    contracting = x.ndim - 1
    out_shape, tokens, into = weight.shape[: len(weight.shape) - contracting], x.shape[0], math.prod(x.shape[1:])
    if isinstance(weight, QArray):
        x, weight = _ordered(x, weight)
        smooth = x if weight.smooth is None else (x * weight.smooth[None].astype(x.dtype))
        out = quantized_matmul(
            smooth.reshape(tokens, into),
            weight.values.reshape(math.prod(out_shape), -1),
            _matrix(weight, weight.scales, contracting),
            zeros=None if weight.zeros is None else _matrix(weight, weight.zeros, contracting),
            activations=weight.activations,
            out_dtype=out_dtype,
            implementation=implementation,
        )
    else:
        out = dense_matmul(x.reshape(tokens, into), weight.reshape(-1, into), out_dtype=out_dtype, implementation=implementation)
    return out.reshape(tokens, *out_shape)


class Rows(NamedTuple):
    """A weight as a plain matrix, and a scale for each of its rows if it has some; activations, smooth: see `QArray`."""

    values: Shaped[Array, "out in"]
    scales: Float[Array, "out 1"] | None = None
    activations: str = "float"
    smooth: Float[Array, "in"] | None = None


def rows_of(weight: Weight | Observed, contracting: int) -> Rows | None:
    """A weight [out.., into..] that is an array, or int8 with a scale for each output; None for any other."""
    if isinstance(weight, Observed):
        return None
    out = math.prod(weight.shape[: len(weight.shape) - contracting])
    if not isinstance(weight, QArray):
        return Rows(weight.reshape(out, -1))
    if weight.values.dtype != INT8 or weight.zeros is not None or weight.order is not None:
        return None
    if weight.scales.shape != (*weight.shape[:-contracting], *[1] * contracting):
        return None
    smooth = None if weight.smooth is None else weight.smooth.reshape(-1)
    return Rows(weight.values.reshape(out, -1), weight.scales.reshape(out, 1), weight.activations, smooth)


def grouped(
    x: Float[Array, "rows in"], weight: Weight, sizes: Int32[Array, "groups"], *, out_dtype: np.dtype, implementation: str = "auto"
) -> Float[Array, "rows *out"]:
    """Rows sorted by group, each times its group's weight [groups, out.., in] on this device; see `pallas_kernels.grouped_matmul`."""
    groups, *out = weight.shape[:-1]
    values = weight.values if isinstance(weight, QArray) else weight
    scales = weight.scales.reshape(groups, -1) if isinstance(weight, QArray) else None
    matrices = values.reshape(groups, math.prod(out), -1)
    found = grouped_matmul(x, matrices, sizes, scales=scales, out_dtype=out_dtype, implementation=implementation)
    return found.reshape(x.shape[0], *out)


def sharded_matmul(
    x: Float[Array, "tokens *into"],
    weight: Weight | Observed,
    axes: Axes,
    *,
    mesh: Mesh,
    rules: Rules,
    out_dtype: np.dtype,
    implementation: str = "auto",
) -> Float[Array, "tokens *out"]:
    """`matmul` on every device with its own tokens and its own shard of the weight, whose logical axes are `axes`.

    The result is sharded like the weight's output dimensions; shards of contracted dimensions are summed, in out_dtype.
    """
    if isinstance(weight, Observed):
        weight.note(x)
        inner: Weight = weight.weight
        return sharded_matmul(x, inner, axes, mesh=mesh, rules=rules, out_dtype=out_dtype, implementation=implementation)
    if isinstance(weight, QArray):
        x, weight = _ordered(x, weight)  # before they are cut: an input may be on another device than its column
    if mesh.size == 1:
        return matmul(x, weight, out_dtype=out_dtype, implementation=implementation)
    parts = partitions(weight, axes, mesh, rules, contracting=x.ndim - 1)
    tokens = partition(x.shape[:1], ("tokens",), mesh, rules)
    out, into = parts.dims[: len(axes) - x.ndim + 1], parts.dims[len(axes) - x.ndim + 1 :]
    summed = tuple(axis for axis in into if axis is not None and mesh.shape[axis] > 1)

    def local(x: Array, weight: Weight) -> Array:
        product = matmul(x, weight, out_dtype=out_dtype, implementation=implementation)
        return jax.lax.psum(product, summed) if summed else product

    specs = (PartitionSpec(*tokens, *into), parts.specs)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*tokens, *out), check_vma=False)(x, weight)


class Partitions(NamedTuple):
    """The mesh axis of each of a weight's dimensions, and the same as the weight's structure with the sharding of each of its arrays."""

    dims: tuple[str | None, ...]
    specs: PartitionSpec | QArray


def partitions(weight: Weight, axes: Axes, mesh: Mesh, rules: Rules, *, contracting: int) -> Partitions:
    """How a weight [out.., into..] with these logical axes and so many contracted dimensions is sharded."""
    dims = tuple(partition(weight.units if isinstance(weight, QArray) else weight.shape, axes, mesh, rules))
    if not isinstance(weight, QArray):
        return Partitions(dims, PartitionSpec(*dims))
    per_block = PartitionSpec(*(part if count > 1 else None for part, count in zip(dims, weight.scales.shape, strict=True)))
    zeros = None if weight.zeros is None else per_block
    smooth = None if weight.smooth is None else PartitionSpec(*dims[len(axes) - contracting :])
    order = None if weight.order is None else PartitionSpec()
    return Partitions(dims, QArray.tree_unflatten(weight.activations, (PartitionSpec(*dims), per_block, zeros, smooth, order)))


def _ordered(x: Shaped[Array, "tokens *into"], weight: QArray) -> tuple[Shaped[Array, "tokens *into"], QArray]:
    """Inputs in the order of the weight's columns, and the weight without one."""
    if weight.order is None:
        return x, weight
    merged = x.reshape(x.shape[0], -1).at[:, weight.order].get(mode="promise_in_bounds", unique_indices=True)
    return merged.reshape(x.shape), replace(weight, order=None)


def _matrix(weight: QArray, per_block: Shaped[Array, "..."], contracting: int) -> Shaped[Array, "outs ins"]:
    """One number per block of the weight as a matrix [out, into]: blocks that are no runs of the merged dimensions are cut up."""
    out, merged = len(weight.shape) - contracting, []
    for begin, end in ((0, out), (out, len(weight.shape))):
        shape, block = weight.shape[begin:end], weight.blocks[begin:end]
        if blocks.run(shape, math.prod(block)) != block:
            for axis in range(begin, end):
                per_block = jnp.repeat(per_block, weight.blocks[axis], axis=axis)
            block = (1,) * (end - begin)
        merged.append(math.prod(shape) // math.prod(block))
    return per_block.reshape(*merged)
