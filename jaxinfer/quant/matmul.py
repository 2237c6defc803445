"""The one matmul of activations with weights: picks the arithmetic by what the weight is, so that model files need not know.

Weights are [out.., into..] and every device multiplies its own shard of one as a plain matrix [out, into]: a dot over several
dimensions would be transposed first by XLA (the whole weight, every step, on CPUs). On a mesh this happens inside shard_map, where
merging dimensions is local whatever is sharded, kernels see ordinary arrays, and the only communication is the one sum over shards of
the contracted dimensions.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxinfer.quant.qarray import QArray
from jaxinfer.sharding import Axes, Rules, partition
from pallas_kernels import dense_matmul, quantized_matmul

Weight = Array | QArray


def matmul(
    x: Float[Array, "tokens *into"], weight: Weight, *, out_dtype: np.dtype, implementation: str = "auto"
) -> Float[Array, "tokens *out"]:
    """Sum x over its dimensions after the first against the weight's trailing ones; float32 accumulation, result in out_dtype."""
    out_shape, tokens, into = weight.shape[: len(weight.shape) - x.ndim + 1], x.shape[0], math.prod(x.shape[1:])
    flat = x.reshape(tokens, into)
    if isinstance(weight, QArray):
        wide = flat.astype(out_dtype) if jnp.dtype(out_dtype).itemsize > x.dtype.itemsize else flat
        values, scales = weight.values.reshape(-1, into), weight.scales.reshape(-1)
        out = quantized_matmul(wide, values, scales, implementation=implementation).astype(out_dtype)
    else:
        out = dense_matmul(flat, weight.reshape(-1, into), out_dtype=out_dtype, implementation=implementation)
    return out.reshape(tokens, *out_shape)


def sharded_matmul(
    x: Float[Array, "tokens *into"],
    weight: Weight,
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
    if mesh.size == 1:
        return matmul(x, weight, out_dtype=out_dtype, implementation=implementation)
    parts = partition(weight.shape, axes, mesh, rules)
    tokens = partition(x.shape[:1], ("tokens",), mesh, rules)
    out, into = parts[: len(axes) - x.ndim + 1], parts[len(axes) - x.ndim + 1 :]
    summed = tuple(axis for axis in into if axis is not None and mesh.shape[axis] > 1)

    def local(x: Array, weight: Weight) -> Array:
        product = matmul(x, weight, out_dtype=out_dtype, implementation=implementation)
        return jax.lax.psum(product, summed) if summed else product

    of_weight = jax.tree.unflatten(jax.tree.structure(weight), [PartitionSpec(*parts), PartitionSpec(*out)][: len(jax.tree.leaves(weight))])
    specs = (PartitionSpec(*tokens, *into), of_weight)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*tokens, *out), check_vma=False)(x, weight)
