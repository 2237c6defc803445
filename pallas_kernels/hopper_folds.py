"""How the weights of one token's matmuls are folded (`hopper_token.Fold`) and dealt out to multiprocessors, for `hopper_links`.

Tiles are dealt out by their number, whole: so the busiest multiprocessor decides, and a tile has as few rows as make its share small. The
token has to fit into shared memory beside a ring of slots.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import hopper, hopper_token
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_token import COLUMNS, MOST_INPUTS, SWIZZLE, Fold, Limbs, RightSide, Same, columns_of

PARTS = (1, 2, 4, 8)  # of a fold
SLOTS, STAGES, LEAST = (16384, 32768), 12, 3  # bytes of a slot; slots at most, and at least
FLYING = (65536, 49152, 98304)  # bytes that are on their way at most
ROOM = 65536  # bytes of shared memory that a token may take, if it can do with so few


class Sizes(NamedTuple):
    """Bytes of a slot of the ring, and bytes that are on their way at most: copies that wait for each other in front of the memory keep
    what blocks of threads send each other waiting as well."""

    slot: int
    flying: int = FLYING[0]


class Link(NamedTuple):
    """A matmul with a weight [outputs, inputs]. gated: silu of the first half of its results times the second half; epsilon: of the root
    mean square norm of the residual stream that comes before, None if there is none; offset: added to the norm's weight."""

    inputs: int
    outputs: int
    gated: bool = False
    epsilon: float | None = None
    offset: float = 0.0

    @property
    def normed(self) -> bool:
        """Whether there is a norm before."""
        return self.epsilon is not None

    @property
    def results(self) -> int:
        """Numbers that the link passes on."""
        return self.outputs // (2 if self.gated else 1)


class Plan(NamedTuple):
    """Static shape of a kernel: links, how the weight of each is folded, `workers` blocks of threads, each with `stages` slots of `slot`
    bytes, `flying` of them on their way at most; dtypes of token, weights and results."""

    links: tuple[Link, ...]
    folds: tuple[Fold, ...]
    workers: int
    stages: int
    slot: int
    flying: int
    dtype: Any
    stored: Any
    made: Any

    @property
    def right(self) -> RightSide:
        """How the token meets the weights."""
        return right_of(self.stored)

    def tiles(self, number: int) -> int:
        """Tiles of a link's weight."""
        return self.links[number].outputs // self.folds[number].rows

    @property
    def blocks(self) -> tuple[int, ...]:
        """The widths in which the ring is read."""
        return tuple(dict.fromkeys(fold.block for fold in self.folds))

    @property
    def rooms(self) -> tuple[tuple[int, int, int], ...]:
        """The shapes in which the token lies there."""
        return tuple(dict.fromkeys(hopper_token.room(self.right, fold) for fold in self.folds))

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of products."""
        return tuple(dict.fromkeys(columns_of(self.right, fold) for fold in self.folds))


def right_of(stored: Any) -> RightSide:
    """How a token meets weights of a dtype."""
    return Limbs() if jnp.dtype(stored) == jnp.int8 else Same(stored)


def folds(link: Link, stored: Any, slot: int) -> list[Fold]:
    """The ways in which a link's weight can be folded such that the token fits; none: no kernel."""
    right, size, found = right_of(stored), jnp.dtype(stored).itemsize, []
    for parts in PARTS:
        rows, part = TILE // parts, link.inputs // parts
        whole = link.inputs % parts == 0 and part * size % SWIZZLE == 0 and link.outputs % rows == 0
        if whole and link.inputs <= MOST_INPUTS and rows >= COLUMNS * (2 if link.gated else 1):
            widths = [slot // TILE >> shift for shift in range(4) if slot // TILE >> shift >= SWIZZLE]
            fold = Fold(link.inputs, parts, next(width for width in widths if part * size % width == 0) // size)
            found += [fold] if _room(right, fold) + LEAST * slot <= _shared(columns_of(right, fold)) else []
    return found


def _room(right: RightSide, fold: Fold) -> int:
    """Bytes of a token."""
    return columns_of(right, fold) * fold.part * jnp.dtype(right.stored).itemsize


def _shared(columns: int) -> int:
    """Bytes of shared memory for the ring and the token, beside sums of products."""
    return hopper.SHARED_BYTES - 2048 - TILE * 4 * columns


def plan_of(links: Sequence[Link], dtype: Any, stored: Any, sizes: Sizes, made: Any = None) -> Plan:
    """How weights are dealt out: so that the busiest worker has least to do, in few parts if the token has room for that. made: dtype of
    the results, the token's if None.

    Raises:
        ValueError: the token does not fit beside slots of that size.
    """
    cores, right, dtype = hopper.cores(), right_of(stored), jnp.dtype(dtype)

    def worth(link: Link, fold: Fold) -> tuple[int, ...]:
        busiest = -(-link.outputs // fold.rows // cores) * fold.rows
        return max(_room(right, fold) - ROOM, 0), busiest, fold.parts

    ways = [folds(link, stored, sizes.slot) for link in links]
    if not all(ways):
        raise ValueError(f"slots of {sizes.slot} bytes: no way to fold {links[ways.index([])]}")
    chosen = [min(found, key=partial(worth, link)) for link, found in zip(links, ways, strict=True)]
    shared = _shared(max(columns_of(right, fold) for fold in chosen)) - max(_room(right, fold) for fold in chosen)
    stages = min(shared // sizes.slot, STAGES)
    workers = min(cores, max(link.outputs // fold.rows for link, fold in zip(links, chosen, strict=True)))
    flying = max(min(sizes.flying // sizes.slot, stages), 1)
    return Plan(tuple(links), tuple(chosen), workers, stages, sizes.slot, flying, dtype, stored, dtype if made is None else jnp.dtype(made))
