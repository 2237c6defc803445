"""Arrays described before they exist: shape, dtype and a name for each axis; rules that map names to mesh axes.

An `ArraySpec` is written once, where a weight or a KV pool is defined. From it follow the sharding, the inputs of ahead-of-time
compilation, the bytes on each device and the slices that the loader reads. The mesh always has the axes `data` (replicas of the
batch) and `tensor` (shards of weights and KV heads), of size 1 where not used. What does not divide is replicated.

This file does not know models, requests or where devices come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "tensor")

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ArraySpec:
    """An array that does not exist yet: `axes` names each dimension for the rules; None is never sharded.

    grain: how many elements of each dimension must stay together on one device; () is one of each.

    Raises:
        ValueError: shape and axes differ in length, or a dimension is not a multiple of its grain.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    grain: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        whole = len(self.grain) == len(self.shape) and not any(size % grain for size, grain in zip(self.shape, self.grain, strict=True))
        if self.grain and not whole:
            raise ValueError(f"shape {self.shape} is not a multiple of grain {self.grain}")

    @property
    def units(self) -> tuple[int, ...]:
        """How many pieces each dimension may be cut into at most."""
        return tuple(size // grain for size, grain in zip(self.shape, self.grain or (1,) * len(self.shape), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Rules:
    """Which mesh axis shards which logical axis: pairs (logical, mesh axis or None). Hashable.

    Every logical axis in use must be named here, so that a misspelt one is an error and not a silent replication.
    """

    table: tuple[tuple[str, str | None], ...] = (
        ("vocab", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("embed", None),
        ("experts", None),
        ("tokens", "data"),
        ("rows", "data"),
        ("pages", "data"),
    )

    def mesh_axis(self, logical: str | None) -> str | None:
        """The mesh axis of a logical axis; None means replicated.

        Raises:
            KeyError: a logical axis that no rule names.
        """
        return None if logical is None else dict(self.table)[logical]


DEFAULT_RULES = Rules()


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as a mesh with the axes data and tensor; sizes not given are 1. Uses the first data x tensor devices.

    Raises:
        ValueError: an unknown axis, a size below 1, or fewer devices than the mesh needs.
    """
    unknown = set(axes) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh axis {sorted(unknown)[0]!r} is unknown; the axes are {', '.join(MESH_AXES)}")
    shape = tuple(int(axes.get(name, 1)) for name in MESH_AXES)
    available = list(jax.devices() if devices is None else devices)
    needed = math.prod(shape)
    if min(shape) < 1:
        raise ValueError(f"mesh sizes must be at least 1, found {dict(axes)}")
    if needed > len(available):
        raise ValueError(f"the mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {needed} devices, found {len(available)}")
    return Mesh(np.asarray(available[:needed], dtype=object).reshape(shape), MESH_AXES)


def partition(shape: Sequence[int], axes: Axes, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """The PartitionSpec of an array: each axis as the rules say if it divides and its mesh axis is still free, else replicated.

    An axis that may be sharded at all comes out as its mesh axis even where that has size 1, so that specs read the same on every mesh.
    """
    used: set[str] = set()
    spec: list[str | None] = []
    for size, logical in zip(shape, axes, strict=True):
        axis = rules.mesh_axis(logical)
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        used.update([axis] if fits and axis is not None else [])
    return PartitionSpec(*spec)


def named(spec: ArraySpec, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """The sharding of a described array."""
    return NamedSharding(mesh, partition(spec.units, spec.axes, mesh, rules))


def struct(spec: ArraySpec, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> jax.ShapeDtypeStruct:
    """What ahead-of-time lowering takes in place of the array."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=named(spec, mesh, rules))


def device_bytes(spec: ArraySpec, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> int:
    """Bytes that one device of the mesh holds."""
    return math.prod(named(spec, mesh, rules).shard_shape(spec.shape)) * spec.dtype.itemsize


def constrain(x: Array, axes: Axes, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Array:
    """Tell the compiler how an intermediate is laid out over the mesh; on one device x itself."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(x.shape, axes, mesh, rules)))


def zeros(spec: ArraySpec, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Array:
    """A described array made of zeros, each device holding its own shard; nothing is compiled twice for equal shapes."""
    return jnp.zeros(spec.shape, spec.dtype, device=named(spec, mesh, rules))
