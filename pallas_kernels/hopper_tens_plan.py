"""How the weights of some tens of tokens' matmuls are dealt out to multiprocessors, for `token_chain.gpu_tens`.

Tokens are the 64 rows of the tensor cores, the rows of a weight their columns, of which there may be any multiple of 8. So each block of
threads has as many rows of a weight as any other, and computes them whole.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import dispatch, hopper
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_folds import Link

MOST, STEP = TILE, 16  # tokens; they are filled up to a multiple, of which two blocks copy halves
COLUMNS = 64  # inputs that shared memory keeps together: 128 bytes
WIDEST = 144  # results of a block of threads, those of a gate's halves apart: its registers hold sums of twice as many
DEEPEST, WIDE = 4, 2  # times as many inputs are copied at once of weights that have few rows, and of what they meet, at most
SLOT = 128  # rows of `COLUMNS` weights, where no block of threads has more
INPUTS = 98304  # bytes of shared memory for inputs, of which a thin weight needs twice as many on their way as of its own
FEWEST_WORKERS = 0.8  # of all multiprocessors
BESIDE = 3072  # bytes of shared memory for all else


class Sizes(NamedTuple):
    """Blocks of threads that share what is copied of inputs, in a cluster."""

    sharing: int = 2


CANDIDATES = (Sizes(), Sizes(1))


class Plan(NamedTuple):
    """Static shape: links, `workers` blocks of threads in clusters of `sharing`, tokens (a multiple of 16), dtype of all numbers."""

    links: tuple[Link, ...]
    workers: int
    tokens: int
    dtype: Any
    sharing: int

    def halves(self, number: int) -> int:
        """Parts of a link's outputs that belong together."""
        return 2 if self.links[number].gated else 1

    def size(self, number: int) -> int:
        """Results of a link that a worker computes."""
        return self.links[number].results // self.workers

    def deep(self, number: int) -> int:
        """How many times `COLUMNS` inputs make a slot of weights, of which each half of a gated link's has its own."""
        columns, size = self.links[number].inputs, self.size(number)
        return next(deep for deep in (DEEPEST, 2, 1) if deep == 1 or (columns % (COLUMNS * deep) == 0 and size * deep <= SLOT))

    def wide(self, number: int) -> int:
        """How many times `COLUMNS` make a slot of inputs."""
        return min(self.deep(number), WIDE)

    def length(self, number: int) -> int:
        """Slots of weights of a link, or of a half."""
        return self.links[number].inputs // (COLUMNS * self.deep(number))

    def taken(self, number: int) -> int:
        """Slots of inputs that a link goes through."""
        return self.links[number].inputs // (COLUMNS * self.wide(number))

    def slots(self, wide: int) -> int:
        """Slots of inputs that there is room for."""
        return INPUTS // (TILE * COLUMNS * 2 * wide)

    @property
    def slot_rows(self) -> int:
        """Rows of `COLUMNS` weights in a slot, in groups of 8 whatever its depth is."""
        most = max(self.size(number) * self.deep(number) for number in range(len(self.links)))
        return most + -most % (8 * DEEPEST)

    @property
    def stages(self) -> int:
        """Slots of weights."""
        beside = BESIDE + INPUTS + 2 * TILE * (max(self.widths) + self.streamed)
        return (hopper.SHARED_BYTES - beside) // (self.slot_rows * COLUMNS * 2)

    @property
    def depths(self) -> list[int]:
        """Of slots of weights, each once."""
        return list(dict.fromkeys(map(self.deep, range(len(self.links)))))

    @property
    def breadths(self) -> list[int]:
        """Of slots of inputs, each once."""
        return list(dict.fromkeys(map(self.wide, range(len(self.links)))))

    @property
    def widths(self) -> list[int]:
        """Results that a worker has of a link, each number once."""
        return list(dict.fromkeys(self.size(number) for number in range(len(self.links))))

    @property
    def before_norms(self) -> list[int]:
        """Links behind which a norm comes."""
        return [number for number, link in enumerate(self.links[1:]) if link.normed]

    @property
    def streamed(self) -> int:
        """Numbers of the residual stream that a worker has of each token, if there is a norm."""
        return self.size(self.before_norms[0]) if self.before_norms else 0

    @property
    def begins(self) -> list[int]:
        """Slots of weights before each link, and of all."""
        return [sum(self.length(before) * self.halves(before) for before in range(number)) for number in range(len(self.links) + 1)]


def refusal(key: dispatch.Key) -> str | None:
    """Why it cannot run for what is known of a key; None when it can."""
    tokens, dtype, stored = int(key["tokens"]), key.get("dtype"), key.get("weight")
    if not 1 < tokens <= MOST:
        return f"its kernels of floats take up to {MOST} tokens, not {tokens}"
    if dtype != "bfloat16" or stored != "bfloat16":
        return f"its kernel of more than 16 tokens takes tokens and weights in bfloat16, not {dtype} and {stored}"
    shapes = [(int(key[f"in{number}"]), int(key[f"out{number}"])) for number in range(int(key.get("links", 0)))]
    passed = [*(inputs for inputs, _ in shapes[1:]), shapes[-1][1] if shapes else 0]  # a key does not know of a gate in the last one
    links = [Link(*shape, gated=shape[1] != width) for shape, width in zip(shapes, passed, strict=True)]
    try:
        plan_of(links, padded(tokens), dtype, Sizes())
    except ValueError as error:
        return str(error)
    return None


def padded(tokens: int) -> int:
    """So many are computed."""
    return tokens + -tokens % STEP


def plan_of(links: Sequence[Link], tokens: int, dtype: Any, sizes: Sizes) -> Plan:
    """How weights are dealt out: evenly, to as many workers as that allows. A last link with a gate may want what `refusal` allows without.

    Raises:
        ValueError: there is no way.
    """
    for link in links:
        if link.inputs % COLUMNS:
            raise ValueError(f"its kernel of more than 16 tokens takes inputs in multiples of {COLUMNS}, not {link.inputs}")
    cores = hopper.cores()
    for workers in range(cores, math.ceil(cores * FEWEST_WORKERS) - 1, -1):
        unit = 8 * workers
        even = all(link.results % unit == 0 and link.outputs % unit == 0 and link.results // workers <= WIDEST for link in links)
        if even and workers % sizes.sharing == 0:
            return Plan(tuple(links), workers, tokens, jnp.dtype(dtype), sizes.sharing)
    outputs = ", ".join(str(link.outputs) for link in links)
    fewest = math.ceil(cores * FEWEST_WORKERS)
    wanted = f"falls to {fewest} to {cores} multiprocessors in equal multiples of 8 results, {WIDEST} at most"
    raise ValueError(f"its kernel of more than 16 tokens takes weights each of which {wanted}, not {outputs}")
