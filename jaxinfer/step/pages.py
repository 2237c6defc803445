"""Edits of the KV pool between steps, compiled once: pages copied (a sequence continues another's half-filled page) and pages wiped
(numbers of a failed sequence must not be found by anyone).

Page ids count within a replica's pool; every device edits its own part. This file knows of a pool's layout only which dimension counts
pages. It does not know why a page is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32

from jaxinfer.sharding import Rules, partition

AT_ONCE = 16  # pages that one launch edits


@dataclass(frozen=True)
class PageEdit:
    """Static: the pools of all layers, an ArraySpec for each of their arrays, and where they live."""

    specs: tuple[Any, ...]
    mesh: Mesh
    rules: Rules

    def copy(
        self, kv: tuple[Any, ...], sources: Int32[Array, "replicas pages"], targets: Int32[Array, "replicas pages"]
    ) -> tuple[Any, ...]:
        """Every layer's `targets` become what `sources` are; unused pairs name the guard page twice. Donates `kv`."""
        return self._on_each(
            lambda pool, axis, source, target: _put(pool, axis, target, jnp.take(pool, source, axis)), kv, sources, targets
        )

    def wipe(self, kv: tuple[Any, ...], pages: Int32[Array, "replicas pages"]) -> tuple[Any, ...]:
        """Every layer's pages become zeros; unused entries name the guard page. Donates `kv`."""
        return self._on_each(lambda pool, axis, page: _put(pool, axis, page, jnp.zeros((), pool.dtype)), kv, pages)

    def _on_each(self, edit: Callable[..., Array], kv: tuple[Any, ...], *ids: Int32[Array, "replicas pages"]) -> tuple[Any, ...]:
        def local(kv: tuple[Any, ...], *ids: Array) -> tuple[Any, ...]:
            own = [values[0] for values in ids]
            return jax.tree.map(lambda spec, pool: edit(pool, spec.axes.index("pages"), *own), self.specs, kv)

        if self.mesh.size == 1:
            return local(kv, *ids)
        pools = jax.tree.map(lambda spec: partition(spec.shape, spec.axes, self.mesh, self.rules), self.specs)
        by_replica = (PartitionSpec("data", None),) * len(ids)
        return jax.shard_map(local, mesh=self.mesh, in_specs=(pools, *by_replica), out_specs=pools, check_vma=False)(kv, *ids)


def blocks(ids: Sequence[tuple[int, ...]], replicas: int, columns: int) -> list[list[np.ndarray]]:
    """Ids as (replica, page...) tuples laid out for launches of at most `AT_ONCE` pages per replica: for each launch one array
    [replicas, AT_ONCE] per column, filled up with the guard page."""
    lines: list[list[tuple[int, ...]]] = [[pages for replica, *pages in ids if replica == r] for r in range(replicas)]  # pyright: ignore[reportAssignmentType]
    launches = []
    for first in range(0, max(map(len, lines), default=0), AT_ONCE):
        arrays = [np.zeros((replicas, AT_ONCE), np.int32) for _ in range(columns)]
        for replica, line in enumerate(lines):
            for place, pages in enumerate(line[first : first + AT_ONCE]):
                for column, page in enumerate(pages):
                    arrays[column][replica, place] = page
        launches.append(arrays)
    return launches


def _put(pool: Array, axis: int, pages: Int32[Array, "pages"], values: Array) -> Array:
    index = (slice(None),) * axis + (pages,)
    return pool.at[index].set(values, mode="promise_in_bounds")
