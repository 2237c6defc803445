"""How the weights of a few tokens' matmuls are folded and dealt out to multiprocessors, for `token_chain.gpu_few`.

Unlike those of one token (`hopper_folds`), inputs do not fit into shared memory, so they pass through it beside the weights, once for all
of a worker's tiles of a link, whose sums are all in registers.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import dispatch, hopper
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_folds import Link
from pallas_kernels.hopper_grid import WARP
from pallas_kernels.hopper_limbs import LIMBS
from pallas_kernels.hopper_token import THREADS, Fold

MOST, STEP = 16, 8  # tokens; they are filled up to a multiple
SLOT = 16384  # bytes, of weights
PARTS = (1, 2, 4)
MOST_SUMS = 144  # of a thread, products of limbs among them; in bfloat16 they leave room for nine slots of weights
INPUTS = 4096  # bytes of shared memory for inputs of each token, and for the sums of a link's tiles in turn, more if these want it
STORED = ("bfloat16", "int8")  # dtypes of weights
FEWEST_WORKERS = 0.875  # of all multiprocessors


class Sizes(NamedTuple):
    """Slots of weights that are on their way at most (see `hopper_folds.Sizes`)."""

    flying: int = 4


CANDIDATES = (Sizes(), Sizes(6), Sizes(3))


class Plan(NamedTuple):
    """Static shape: links and how the weight of each is folded, `workers` blocks of threads, tokens (a multiple of 8)."""

    links: tuple[Link, ...]
    folds: tuple[Fold, ...]
    workers: int
    tokens: int
    dtype: Any
    stored: Any
    flying: int

    @property
    def block(self) -> int:
        """Inputs of a slot."""
        return block_of(self.stored)

    @property
    def limbs(self) -> bool:
        """Whether inputs are cut into limbs, which meet int8 weights (see `hopper_limbs`)."""
        return self.stored == jnp.int8

    @property
    def cutters(self) -> int:
        """Warpgroups that cut them."""
        return self.tokens // STEP if self.limbs else 0

    @property
    def room(self) -> int:
        """Bytes for inputs, and for sums in turn."""
        return max(INPUTS * self.tokens, *(4 * TILE * self.most(link) * self.met(link) for link in range(len(self.links))))

    @property
    def stages(self) -> int:
        """Slots of weights."""
        return (hopper.SHARED_BYTES - 4096 - self.room) // SLOT

    @property
    def sums(self) -> int:
        """Sums of a thread, at most."""
        return max(_sums(fold, self.most(link), self.tokens, self.stored) for link, fold in enumerate(self.folds))

    def tiles(self, number: int) -> int:
        """Tiles of a link's weight."""
        return self.links[number].outputs // self.folds[number].rows

    def most(self, number: int) -> int:
        """Tiles of a link that a worker has at most."""
        return -(-self.tiles(number) // self.workers)

    def columns(self, number: int) -> int:
        """Columns of a link's products."""
        return self.folds[number].parts * self.tokens

    def met(self, number: int) -> int:
        """Columns of a link's sums: with limbs those alone that count, where a part of the weight has met its own inputs."""
        return self.tokens if self.limbs else self.columns(number)

    def slots(self, number: int) -> int:
        """Blocks of a link's inputs that there is room for."""
        return min(self.room // (self.columns(number) * self.block * 2), hopper.BARRIERS)

    def halves(self, number: int) -> int:
        """Parts of a link's outputs that are tiles together."""
        return 2 if self.links[number].gated else 1

    def squares(self, number: int) -> int:
        """Sums of squares that a tile of a link leaves: a warp sums for a token."""
        return max(1, self.folds[number].rows // self.halves(number) // WARP) * self.tokens

    @property
    def before_norms(self) -> list[int]:
        """Links behind which a norm comes."""
        return [number for number, link in enumerate(self.links[1:]) if link.normed]

    @property
    def parts(self) -> int:
        """Copies that fill a slot of inputs, at most."""
        return max(fold.parts for fold in self.folds)

    @property
    def copies(self) -> int:
        """Copies that fill a slot of weights, at most."""
        return max(fold.parts * self.halves(number) for number, fold in enumerate(self.folds))


def refusal(key: dispatch.Key) -> str | None:
    """Why it cannot run for what is known of a key; None when it can."""
    tokens, dtype, stored = int(key["tokens"]), key.get("dtype"), key.get("weight")
    if not 1 < tokens <= MOST:
        return f"its kernels of floats take up to {MOST} tokens, not {tokens}"
    if dtype != "bfloat16" or stored not in STORED:
        return f"its kernel of several tokens takes tokens in bfloat16 and weights that are all so, or all int8, not {dtype} and {stored}"
    links = [Link(int(key[f"in{number}"]), int(key[f"out{number}"]), True, 1.0) for number in range(int(key.get("links", 0)))]
    try:
        plan_of(links, padded(tokens), dtype, stored, Sizes())
    except ValueError as error:
        return str(error)
    return None


def padded(tokens: int) -> int:
    """So many are computed."""
    return tokens + -tokens % STEP


def block_of(stored: Any) -> int:
    """Inputs of a slot."""
    return SLOT // TILE // jnp.dtype(stored).itemsize


def _folds(link: Link, tokens: int, stored: Any) -> list[Fold]:
    """The ways to fold a weight: such that a tile's numbers go evenly to threads."""
    halves, block = 2 if link.gated else 1, block_of(stored)
    fitting = [parts for parts in PARTS if link.inputs % (parts * block) == 0 and link.outputs % (TILE // parts) == 0]
    return [Fold(link.inputs, parts, block) for parts in fitting if TILE // parts // halves * tokens % THREADS == 0]


def _sums(fold: Fold, most: int, tokens: int, stored: Any) -> int:
    """Registers of a thread for sums of so many tiles; with limbs those that count, and the products of a slot."""
    columns = fold.parts * tokens
    numbers = most * tokens + LIMBS * columns if jnp.dtype(stored) == jnp.int8 else most * columns
    return numbers * TILE // THREADS


def plan_of(links: Sequence[Link], tokens: int, dtype: Any, stored: Any, sizes: Sizes) -> Plan:
    """How weights are dealt out: so that the busiest workers have least to do, then in few parts, to few workers.

    Raises:
        ValueError: there is no way, or no room.
    """
    ways = [_folds(link, tokens, stored) for link in links]
    if not all(ways):
        link = links[ways.index([])]
        wanted = f"inputs in multiples of {block_of(stored)} and outputs in multiples of 64, of some links of 32 or 16"
        raise ValueError(f"its kernel of several tokens takes {wanted}, not {link.inputs} and {link.outputs}")

    def worth(link: Link, workers: int, fold: Fold) -> tuple[bool, int, int]:
        most = -(-link.outputs // fold.rows // workers)
        return _sums(fold, most, tokens, stored) > MOST_SUMS, most * fold.rows, fold.parts

    def dealt(workers: int) -> tuple[bool, int, Plan]:
        folds = [min(found, key=partial(worth, link, workers)) for link, found in zip(links, ways, strict=True)]
        cost = sum(link.inputs * worth(link, workers, fold)[1] for link, fold in zip(links, folds, strict=True))
        plan = Plan(tuple(links), tuple(folds), workers, tokens, jnp.dtype(dtype), jnp.dtype(stored), *sizes)
        return plan.sums > MOST_SUMS, cost, plan

    cores = hopper.cores()
    over, _, plan = min(map(dealt, range(max(1, math.ceil(cores * FEWEST_WORKERS)), cores + 1)), key=lambda each: each[:2])
    if over:
        raise ValueError(f"its kernel of several tokens has no room for {max(link.outputs for link in links)} outputs of {tokens} tokens")
    return plan
