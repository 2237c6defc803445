"""A chain of a few tokens in one kernel on Hopper GPUs (Pallas Mosaic GPU): weights are on their way while blocks of threads wait for each
other.

A weight's rows are cut into tiles, folded where that deals them out more evenly (`hopper_token.Fold`), and each block of threads computes
all its tiles of a link at once, whole: so inputs are read once for them, and no sums come in parts. One producer copies weights, those of
the next links as well, since they depend on nothing. Another copies inputs, once all blocks have said that they have written theirs. What
comes before a norm is multiplied by its weight where it is written; the root mean square is one factor for a token's results, worked out
from squares that each tile leaves, summed in order. A token's result depends on that token, the weights and static shapes alone.

int8 weights become bfloat16 in registers; the inputs that they meet change places instead of them (`hopper_codes.operand`), where they are
written.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch, hopper, hopper_codes, hopper_counters
from pallas_kernels.hopper import ACC, TILE
from pallas_kernels.hopper_codes import SPAN
from pallas_kernels.hopper_folds import Link
from pallas_kernels.hopper_token import THREADS, Fold, thread
from pallas_kernels.norm import rms_norm
from pallas_kernels.token_chain.reference import Weight

MOST, STEP, WARP = 16, 8, 32  # tokens; they are filled up to a multiple; threads of a warp
SLOT, STEP_INPUTS = 16384, 128  # bytes of a slot of weights; inputs that are multiplied at a time
PARTS = (1, 2, 4)
INPUTS = (4096, 8192)  # bytes of shared memory for inputs of each token, and for the sums of a link's tiles in turn
MOST_SUMS = 144  # of a thread
FEWEST_STAGES = 4  # slots of weights
FLYING = (4, 6)  # of them on their way at most: see `hopper_folds.Sizes`
REGISTERS = [232, 40, 40]  # of a thread: of the consumer, of the producers of weights and of inputs
FEWEST_WORKERS = 0.875  # of all multiprocessors


class Sizes(NamedTuple):
    """Slots of weights that are on their way at most; bytes for inputs of each token, if sums have room in them."""

    flying: int = FLYING[0]
    inputs: int = INPUTS[0]


class Plan(NamedTuple):
    """Static shape: links and how the weight of each is folded, `workers` blocks of threads, tokens (a multiple of 8)."""

    links: tuple[Link, ...]
    folds: tuple[Fold, ...]
    workers: int
    tokens: int
    dtype: Any
    stored: Any
    flying: int
    inputs: int

    @property
    def block(self) -> int:
        """Inputs of a slot."""
        return block_of(self.stored)

    @property
    def room(self) -> int:
        """Bytes for inputs, and for sums in turn."""
        return max(self.inputs * self.tokens, *(4 * TILE * self.most(link) * self.columns(link) for link in range(len(self.links))))

    @property
    def stages(self) -> int:
        """Slots of weights."""
        return (hopper.SHARED_BYTES - 4096 - self.room) // SLOT

    @property
    def sums(self) -> int:
        """Sums of a thread, at most."""
        return max(self.most(link) * self.columns(link) * TILE // THREADS for link in range(len(self.links)))

    def tiles(self, number: int) -> int:
        """Tiles of a link's weight."""
        return self.links[number].outputs // self.folds[number].rows

    def most(self, number: int) -> int:
        """Tiles of a link that a worker has at most."""
        return -(-self.tiles(number) // self.workers)

    def columns(self, number: int) -> int:
        """Columns of a link's products."""
        return self.folds[number].parts * self.tokens

    def slots(self, number: int) -> int:
        """Blocks of a link's inputs that there is room for."""
        return self.room // (self.columns(number) * self.block * 2)

    def before_norm(self, number: int) -> bool:
        """Whether the next link begins with a norm."""
        return number + 1 < len(self.links) and self.links[number + 1].normed


class Scratch(NamedTuple):
    """Shared memory: weights; inputs and sums, once for each shape; a number for each thread, factors of tokens, what a count was."""

    ring: Any
    inputs: dict[int, Any]
    sums: dict[tuple[int, int], Any]
    spilled: Any
    partial: Any
    factors: Any
    told: Any
    full: Any
    free: Any
    there: Any
    used: Any


class Refs(NamedTuple):
    """Memory: inputs, then what is written. passed: what each link but the last passes on; squares: of each tile, before a norm."""

    x: Any
    held: Any
    weights: tuple[Any, ...]
    scales: tuple[Any, ...]
    norms: tuple[Any, ...]
    counters: Any
    out: Any
    total: Any
    passed: tuple[Any, ...]
    squares: dict[int, Any]


def refusal(key: dispatch.Key) -> str | None:
    """Why it cannot run for what is known of a key; None when it can."""
    tokens, dtype, stored = int(key["tokens"]), key.get("dtype"), key.get("weight")
    if not 1 < tokens <= MOST:
        return f"its kernels of floats take up to {MOST} tokens, not {tokens}"
    if dtype != "bfloat16" or stored not in ("int8", dtype):
        return f"its kernel of several tokens takes tokens in bfloat16 and weights that are all so, or all int8, not {dtype} and {stored}"
    links = [Link(int(key[f"in{number}"]), int(key[f"out{number}"]), True, 1.0) for number in range(int(key.get("links", 0)))]
    try:
        plan_of(links, _padded(tokens), dtype, stored, Sizes())
    except ValueError as error:
        return str(error)
    return None


def _padded(tokens: int) -> int:
    return tokens + -tokens % STEP


def block_of(stored: Any) -> int:
    """Inputs of a slot."""
    return SLOT // TILE // jnp.dtype(stored).itemsize


def pieces(fold: Fold) -> int:
    """Sums that a token has of a tile's squares: warps sum."""
    return max(1, fold.rows // WARP)


def _folds(link: Link, tokens: int, stored: Any) -> list[Fold]:
    """The ways to fold a weight."""
    halves, block = 2 if link.gated else 1, block_of(stored)
    least = SPAN if jnp.dtype(stored) == jnp.int8 else 1
    fitting = [parts for parts in PARTS if link.inputs % (parts * block) == 0 and link.outputs % (TILE // parts) == 0]
    rows = {parts: TILE // parts // halves for parts in fitting}
    return [Fold(link.inputs, parts, block) for parts in fitting if rows[parts] * tokens % THREADS == 0 and rows[parts] >= least]


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

    def busiest(link: Link, fold: Fold, workers: int) -> int:
        return -(-link.outputs // fold.rows // workers) * fold.rows

    def dealt(workers: int) -> tuple[int, Plan]:
        folds = [
            min(found, key=lambda fold, link=link: (busiest(link, fold, workers), fold.parts)) for link, found in zip(links, ways, strict=True)
        ]
        cost = sum(link.inputs * busiest(link, fold, workers) for link, fold in zip(links, folds, strict=True))
        return cost, Plan(tuple(links), tuple(folds), workers, tokens, jnp.dtype(dtype), jnp.dtype(stored), *sizes)

    cores = hopper.cores()
    plan = min(map(dealt, range(max(1, math.ceil(cores * FEWEST_WORKERS)), cores + 1)), key=lambda each: each[0])[1]
    if plan.sums > MOST_SUMS or plan.stages < FEWEST_STAGES:
        raise ValueError(f"its kernel of several tokens has no room for {max(link.outputs for link in links)} outputs of {tokens} tokens")
    return plan._replace(flying=min(plan.flying, plan.stages))


def run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    links: Sequence[Link],
    counters: Any,
    sizes: Sizes,
) -> tuple[Array, Array]:
    """The last link's results, and the residual stream behind the last norm. counters: the program's (`hopper_counters`)."""
    tokens, stored = x.shape[0], weights[0].values.dtype
    value, total = (jnp.pad(each, ((0, -tokens % STEP), (0, 0))) for each in (x, held))

    def given(value: Array) -> Array:
        return hopper_codes.permute(value) if stored == jnp.int8 else value

    if hopper.interpreting():
        for weight, norm, link in zip(weights, norms, links, strict=True):
            if norm is not None and link.epsilon is not None:
                total = total + value
                value = rms_norm(total, norm, epsilon=link.epsilon, offset=link.offset)
            plan = plan_of([link._replace(epsilon=None)], value.shape[0], x.dtype, stored, sizes)
            value, _ = _run(given(value), None, (weight.values,), _flat([weight]), (), None, plan=plan, interpreted=True)
        return value[:tokens], total[:tokens]
    plan = plan_of(links, value.shape[0], x.dtype, stored, sizes)
    found = tuple(norm for norm in norms if norm is not None)
    shared, matrices = hopper_counters.made() if counters is None else counters, tuple(weight.values for weight in weights)
    settings = {"plan": plan, "interpreted": False}
    value, total = _run(given(value), total if found else None, matrices, _flat(weights), found, shared, **settings)
    return value[:tokens], held if total is None else total[:tokens]


def _flat(weights: Sequence[Weight]) -> tuple[Float[Array, "out"], ...]:
    return tuple(weight.scales.reshape(-1) for weight in weights if weight.scales is not None)


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"] | None,
    weights: tuple[Shaped[Array, "_ _"], ...],
    scales: tuple[Float[Array, "_"], ...],
    norms: tuple[Float[Array, "_"], ...],
    counters: Any,
    *,
    plan: Plan,
    interpreted: bool,
) -> tuple[Array, Array | None]:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    links, shaped = range(len(plan.links)), jax.ShapeDtypeStruct
    normed, several = [number for number in links if plan.before_norm(number)], counters is not None
    made = (
        shaped((plan.tokens, plan.links[-1].results), plan.dtype),
        *([shaped(x.shape if held is None else held.shape, plan.dtype)] if normed else []),
        tuple(shaped((plan.tokens, link.results), plan.dtype) for link in plan.links[:-1]),
        tuple(shaped((plan.tiles(number) * pieces(plan.folds[number]) * plan.tokens,), jnp.float32) for number in normed),
    )
    given = (x, *([held] if normed else []), weights, scales, norms, *([counters] if several else []))

    def body(*refs: Any) -> None:
        left = iter(refs)
        x, held = next(left), next(left) if normed else None
        weights, scales, norms = next(left), next(left), next(left)
        shared, out, total = next(left) if several else None, next(left), next(left) if normed else None
        passed, squares = next(left), dict(zip(normed, next(left), strict=True))
        _body(plan, Refs(x, held, weights, scales, norms, shared, out, total, passed, squares), _named(plan, next(left)))

    kernel = hopper.kernel(body, _scratch(plan), out_type=made, grid={"worker": plan.workers}, registers=REGISTERS)
    out, *total = kernel(*given)[: 2 if normed else 1]
    return out, total[0] if normed else held


def _shapes(plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
    """The columns of inputs, and how many tiles of how many columns sums have."""
    links = range(len(plan.links))
    return list(dict.fromkeys(map(plan.columns, links))), list(dict.fromkeys((plan.most(link), plan.columns(link)) for link in links))


def _scratch(plan: Plan) -> tuple[Any, ...]:
    columns, sums = _shapes(plan)
    inputs = [hopper.swizzled((plan.room // (each * plan.block * 2), each, plan.block), plan.dtype) for each in columns]
    tiles = [plgpu.SMEM((count, each, TILE), jnp.float32) for count, each in sums]
    slots = max(map(plan.slots, range(len(plan.links))))
    copies = max(fold.parts * (2 if link.gated else 1) for link, fold in zip(plan.links, plan.folds, strict=True))
    return (
        hopper.swizzled((plan.stages, TILE, plan.block), plan.stored),
        plgpu.RefUnion(*inputs, *tiles),
        *([hopper.swizzled((TILE, STEP_INPUTS), plan.dtype)] if _spills(plan) else []),
        plgpu.SMEM((THREADS,), jnp.float32),
        plgpu.SMEM((MOST,), jnp.float32),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.Barrier(num_barriers=plan.stages, num_arrivals=copies),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=slots, num_arrivals=max(fold.parts for fold in plan.folds)),
        plgpu.Barrier(num_barriers=slots),
    )


def _named(plan: Plan, made: tuple[Any, ...]) -> Scratch:
    ring, both, *others = made
    columns, sums = _shapes(plan)
    inputs, tiles = dict(zip(columns, both, strict=False)), dict(zip(sums, both[len(columns) :], strict=True))
    return Scratch(ring, inputs, tiles, *([] if _spills(plan) else [None]), *others)


def _spills(plan: Plan) -> bool:
    """The interpreter multiplies from shared memory."""
    return plan.stored == jnp.int8 and hopper.interpreting()


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    worker, warpgroup, links = lax.axis_index("worker"), lax.axis_index("wg"), range(len(plan.links))
    mine = [lax.div(plan.tiles(number) - worker + plan.workers - 1, jnp.int32(plan.workers)) for number in links]
    begins, ahead = [], jnp.int32(0)
    for fold, count in zip(plan.folds, mine, strict=True):
        begins.append(ahead)
        ahead = ahead + count * fold.length

    @pl.when(warpgroup == 0)
    def _consumer() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        for number in links:
            if plan.links[number].normed:
                _await(plan, refs, number)
                _factors(plan, refs, scratch, number)
            for count in sorted({plan.most(number), plan.tiles(number) // plan.workers} - {0}):
                pl.when(mine[number] == count)(partial(_multiply, plan, refs, scratch, number, count, begins[number]))
            if number < links[-1]:
                _tell(refs, number)
        if refs.counters is not None:
            done = hopper_counters.last(refs.counters, hopper_counters.FIRST + len(links), plan.workers, scratch.told)
            pl.when(done)(lambda: _clear(refs, len(links)))

    @pl.when(warpgroup == 1)
    def _weights() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        for number in links:
            run = partial(_weight, plan, refs, scratch, number, begins[number], mine[number])
            lax.fori_loop(0, mine[number] * plan.folds[number].length, lambda used, _, run=run: run(used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], ahead, plan.stages)

    @pl.when(warpgroup == 2)
    def _inputs() -> None:
        plgpu.set_max_registers(REGISTERS[2], action="decrease")
        for number, fold in enumerate(plan.folds):
            if number:
                _await(plan, refs, number)
            count = jnp.where(mine[number] > 0, fold.length, 0)
            run = partial(_input, plan, refs, scratch, number)
            lax.fori_loop(0, count, lambda used, _, run=run: run(used), None)
            hopper.drain(lambda slot: scratch.used.at[slot], count, plan.slots(number))


def _weight(plan: Plan, refs: Refs, scratch: Scratch, number: int, begin: Any, mine: Any, used: Any) -> None:
    """Copy a block of each part of a tile; `begin` counts the blocks of the links before, `used` those of this one."""
    link, fold, weight = plan.links[number], plan.folds[number], refs.weights[number]
    tile = lax.axis_index("worker") + lax.rem(used, mine) * plan.workers
    column, total = lax.div(used, mine) * plan.block, begin + used
    slot = lax.rem(total, jnp.int32(plan.stages))
    pl.when(total >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    landed = scratch.full.at[lax.rem(total + plan.stages - plan.flying, jnp.int32(plan.stages))]
    pl.when(total >= plan.flying)(lambda: plgpu.barrier_wait(landed))
    target, full, halves = scratch.ring.at[slot], scratch.full.at[slot], 2 if link.gated else 1
    size = fold.rows // halves
    for part in range(fold.parts):
        for half in range(halves):
            block = weight.at[pl.ds(half * link.results + tile * size, size), pl.ds(part * fold.part + column, plan.block)]
            plgpu.copy_gmem_to_smem(block, target.at[pl.ds(part * fold.rows + half * size, size)], full)
    for _ in range(max(f.parts * (2 if li.gated else 1) for li, f in zip(plan.links, plan.folds, strict=True)) - fold.parts * halves):
        plgpu.barrier_arrive(full)  # in place of a copy


def _input(plan: Plan, refs: Refs, scratch: Scratch, number: int, used: Any) -> None:
    """Copy a block of each part of a link's inputs."""
    fold, slots = plan.folds[number], plan.slots(number)
    given = refs.x if number == 0 else refs.passed[number - 1]
    slot = lax.rem(used, jnp.int32(slots))
    pl.when(used >= slots)(lambda: plgpu.barrier_wait(scratch.used.at[slot]))
    target, there = scratch.inputs[plan.columns(number)].at[slot], scratch.there.at[slot]
    for part in range(fold.parts):
        block = given.at[:, pl.ds(part * fold.part + used * plan.block, plan.block)]
        plgpu.copy_gmem_to_smem(block, target.at[pl.ds(part * plan.tokens, plan.tokens)], there)
    for _ in range(max(each.parts for each in plan.folds) - fold.parts):
        plgpu.barrier_arrive(there)


def _multiply(plan: Plan, refs: Refs, scratch: Scratch, number: int, count: int, begin: Any) -> None:
    """All of this worker's `count` tiles of a link, and what comes of them."""
    fold, columns, slots = plan.folds[number], plan.columns(number), plan.slots(number)
    sums = scratch.sums[plan.most(number), columns]

    def accumulate(*accumulators: Any) -> None:
        def step(place: Any, _: None) -> None:
            here = lax.rem(place, jnp.int32(slots))
            plgpu.barrier_wait(scratch.there.at[here])
            for index, accumulator in enumerate(accumulators):
                slot = lax.rem(begin + place * count + index, jnp.int32(plan.stages))
                plgpu.barrier_wait(scratch.full.at[slot])
                _add(plan, scratch, accumulator, scratch.ring.at[slot], scratch.inputs[columns].at[here])
                plgpu.barrier_arrive(scratch.free.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch.used.at[here])

        lax.fori_loop(0, fold.length, step, None)
        for index, accumulator in enumerate(accumulators):
            sums.at[index].transpose((1, 0))[...] = plgpu.layout_cast(accumulator[...], plgpu.Layout.WGMMA_TRANSPOSED)

    pl.run_scoped(accumulate, *[ACC((TILE, columns), jnp.float32)] * count)
    plgpu.commit_smem()
    lax.fori_loop(0, count, lambda index, _: _leave(plan, refs, scratch, number, index, sums.at[index]), None)
    plgpu.commit_smem()  # what was read there is written by copies next


def _add(plan: Plan, scratch: Scratch, accumulator: Any, weight: Any, inputs: Any) -> None:
    """Add the products of a slot; the weight is read no more."""
    if plan.stored != jnp.int8:
        plgpu.wgmma(accumulator, weight, inputs.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return
    for begin in range(0, plan.block, STEP_INPUTS):
        place = pl.ds(begin, STEP_INPUTS)
        values, right = hopper_codes.operand(weight.at[:, place], plan.dtype), inputs.at[:, place].transpose((1, 0))
        if scratch.spilled is not None:
            scratch.spilled[...] = values
            plgpu.commit_smem()
            values = scratch.spilled
        plgpu.wgmma(accumulator, values, right)
        plgpu.wgmma_wait(0 if scratch.spilled is not None else 1)


def _leave(plan: Plan, refs: Refs, scratch: Scratch, number: int, index: Any, sums: Any) -> None:
    """A tile's results: written, with its norm's weight if one comes next."""
    link, fold, tile = plan.links[number], plan.folds[number], lax.axis_index("worker") + index * plan.workers
    halves, moved = 2 if link.gated else 1, plan.stored == jnp.int8
    size = fold.rows // halves
    grid, rows = Grid(plan.tokens, size), pl.ds(tile * size, size)
    found = [met(fold, grid, sums, half * size) for half in range(halves)]
    if refs.scales:
        scales = [grid.load(refs.scales[number].at[pl.ds(half * link.results + tile * size, size)], (0, 1)) for half in range(halves)]
        found = [part * scale.astype(jnp.float32) for part, scale in zip(found, scales, strict=True)]
    if link.normed:
        factors = grid.load(scratch.factors, (1, 0))
        found = [part * factors for part in found]
    value = _swiglu(plan, *found) if link.gated else found[0].astype(plan.dtype)
    if number + 1 == len(plan.links):
        grid.store(refs.out.at[:, rows], value)
        return
    if not plan.before_norm(number):
        grid.store(refs.passed[number].at[:, rows], value, moved=moved)
        return
    first = not any(plan.before_norm(earlier) for earlier in range(number))
    stream = grid.load((refs.held if first else refs.total).at[:, rows]).astype(jnp.float32) + value.astype(jnp.float32)
    stream = stream.astype(plan.dtype)
    grid.store(refs.total.at[:, rows], stream)
    wide, after = stream.astype(jnp.float32), plan.links[number + 1]
    norm = grid.load(refs.norms[sum(plan.before_norm(earlier) for earlier in range(number))].at[rows], (0, 1)).astype(jnp.float32)
    scaled = wide * (norm + after.offset if after.offset else norm)
    grid.store(refs.passed[number].at[:, rows], scaled.astype(plan.dtype), moved=moved)
    sums = plan.tokens * pieces(fold)
    grid.store_sums(refs.squares[number].at[pl.ds(tile * sums, sums)], wide * wide)


def _swiglu(plan: Plan, gate: Any, up: Any) -> Any:
    gate, up = (values.astype(plan.dtype).astype(jnp.float32) for values in (gate, up))
    return (gate / (1.0 + jnp.exp(-gate)) * up).astype(plan.dtype)


class Grid(NamedTuple):
    """Numbers of so many tokens, for so many rows each, of a warpgroup's threads: thread t has those of places t, t + 128, ..., where a
    token's rows lie side by side. Both are powers of two."""

    tokens: int
    rows: int

    @property
    def layout(self) -> Any:
        """Of a flat array of all numbers."""
        return plgpu.Layout.WG_STRIDED((self.tokens * self.rows,), vec_size=1)

    def made(self, dtype: Any) -> Any:
        """What is loaded."""
        return plgpu.ShapeDtypeStruct((self.tokens * self.rows,), dtype, layout=self.layout)

    def load(self, ref: Any, strides: tuple[int, int] | None = None) -> Any:
        """A reference [tokens, rows], or with strides of a token and of a row."""
        if hopper.interpreting():
            return self._interpreted(ref, strides)

        def load(_: Any, ref: Any) -> Any:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import llvm

            kind = ir.MemRefType(ref.type).element_type
            return self.array([llvm.load(kind, pointer) for pointer in self.pointers(ref, strides)])

        return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=self.made(ref.dtype))(load)(ref)

    def _interpreted(self, ref: Any, strides: tuple[int, int] | None) -> Any:
        values = ref[...]
        if strides is not None:
            values = jnp.broadcast_to(values[: self.tokens, None] if strides[0] else values[None], (self.tokens, self.rows))
        return values.reshape(-1)

    def store(self, ref: Any, values: Any, *, moved: bool = False) -> None:
        """Write a reference [tokens, rows]. moved: in the order of `hopper_codes.permute`."""
        if hopper.interpreting():
            ref[...] = values.reshape(self.tokens, self.rows)
            return

        def store(_: Any, ref: Any, values: Any) -> None:
            from jaxlib.mlir.dialects import llvm

            for number, pointer in zip(numbers_of(values), self.pointers(ref, None, moved=moved), strict=True):
                llvm.store(number, pointer)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def store_sums(self, ref: Any, values: Any) -> None:
        """Write each token's sum over its rows, over 32 at a time if there are more, float32 [tokens] behind one another; not in the
        interpreter."""

        def store(_: Any, ref: Any, values: Any) -> None:
            from jax.experimental.mosaic.gpu import utils
            from jaxlib.mlir.dialects import arith, llvm

            word = thread().type
            for place, number in enumerate(numbers_of(values)):
                total = number
                for shift in range(min(self.rows, WARP).bit_length() - 1):
                    total = arith.addf(total, utils.shfl_bfly(total, 1 << shift))
                token, row = self.place(place)
                at = arith.addi(arith.muli(arith.divui(row, utils.c(WARP, word)), utils.c(self.tokens, word)), token)
                with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(row, utils.c(WARP, word)), utils.c(0, word))):
                    llvm.store(total, utils.getelementptr(utils.memref_ptr(ref), [at], total.type))

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def place(self, index: int) -> tuple[Any, Any]:
        """Token and row of a thread's number."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith

        at = arith.addi(thread(), utils.c(index * THREADS, thread().type))
        return arith.divui(at, utils.c(self.rows, at.type)), arith.remui(at, utils.c(self.rows, at.type))

    def pointers(self, ref: Any, strides: tuple[int, int] | None, *, moved: bool = False) -> list[Any]:
        """Where a thread's numbers are."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        kind = ir.MemRefType(ref.type)
        steps = strides or tuple(kind.get_strides_and_offset()[0])
        found = []
        for index in range(self.tokens * self.rows // THREADS):
            token, row = self.place(index)
            row = _moved(row) if moved else row
            at = arith.addi(arith.muli(token, utils.c(steps[0], token.type)), arith.muli(row, utils.c(steps[1], row.type)))
            found.append(utils.getelementptr(utils.memref_ptr(ref), [at], kind.element_type))
        return found

    def array(self, numbers: Sequence[Any]) -> Any:
        """A thread's numbers as an array."""
        from jax.experimental.mosaic.gpu import fragmented_array as layouts
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector as vectors

        registers = np.array([vectors.from_elements(ir.VectorType.get((1,), each.type), [each]) for each in numbers], dtype=object)
        layout = layouts.WGStridedFragLayout((self.tokens * self.rows,), 1)
        return layouts.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _moved(row: Any) -> Any:
    """Where `hopper_codes.permute` puts a row's number: of 16, 4 lane + 2 tile + element goes to 8 tile + 2 lane + element."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    def c(value: int) -> Any:
        return utils.c(value, row.type)

    tile, lane = arith.shli(arith.andi(row, c(2)), c(2)), arith.andi(arith.shrui(row, c(1)), c(6))
    return arith.ori(arith.ori(arith.andi(row, c(-15)), tile), lane)


def numbers_of(values: Any) -> list[Any]:
    """A thread's numbers of an array."""
    from jaxlib.mlir.dialects import vector as vectors

    return [vectors.extract(each, [], [0]) for each in values.registers.flat]


def met(fold: Fold, grid: Grid, sums: Any, first: int) -> Any:
    """What the products `sums` [columns, 64] in shared memory come to for the tile's rows from `first` on, float32."""
    if hopper.interpreting():
        whole = sums[...].reshape(fold.parts, grid.tokens, fold.parts, fold.rows)
        return reduce(jnp.add, [whole[part, :, part, first : first + grid.rows] for part in range(fold.parts)]).reshape(-1)

    def load(_: Any, sums: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        kind = ir.MemRefType(sums.type)
        found = []
        for pointer in grid.pointers(sums, (TILE, 1)):
            places = [part * grid.tokens * TILE + part * fold.rows + first for part in range(fold.parts)]
            offsets = [utils.c(place, ir.IntegerType.get_signless(32)) for place in places]
            each = [llvm.load(kind.element_type, utils.getelementptr(pointer, [at], kind.element_type)) for at in offsets]
            found.append(reduce(arith.addf, each))
        return grid.array(found)

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=grid.made(jnp.float32))(load)(sums)


def _factors(plan: Plan, refs: Refs, scratch: Scratch, number: int) -> None:
    """What the root mean square of each token multiplies its results by: every block sums the squares in the same order."""
    link, tokens = plan.links[number], plan.tokens

    def work(_: Any, squares: Any, partial: Any, factors: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm
        from jaxlib.mlir.dialects import math as maths

        kind, mine = ir.F32Type.get(), thread()

        def at(ref: Any, place: Any) -> Any:
            return utils.getelementptr(utils.memref_ptr(ref), [place], kind)

        def c(value: int) -> Any:
            return utils.c(value, mine.type)

        size, total = ir.MemRefType(squares.type).shape[0], utils.c(0.0, kind)
        for begin in range(0, size, THREADS):
            place = arith.addi(mine, c(begin))
            there = arith.cmpi(arith.CmpIPredicate.ult, place, c(size))
            found = llvm.load(kind, at(squares, arith.select(there, place, c(0))))
            total = arith.addf(total, arith.select(there, found, utils.c(0.0, kind)))
        llvm.store(total, at(partial, mine))
        utils.warpgroup_barrier()
        token = arith.remui(mine, c(tokens))
        parts = [llvm.load(kind, at(partial, arith.addi(token, c(index * tokens)))) for index in range(THREADS // tokens)]
        mean = arith.mulf(reduce(arith.addf, parts), utils.c(1.0 / link.inputs, kind))
        root = maths.rsqrt(arith.addf(mean, utils.c(link.epsilon, kind)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, mine, c(tokens))):
            llvm.store(root, at(factors, mine))
        utils.warpgroup_barrier()

    refs_given = (refs.squares[number - 1], scratch.partial, scratch.factors)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)(work)(*refs_given)


def _counter(refs: Refs, number: int) -> Any:
    return refs.counters.at[pl.ds(hopper_counters.FIRST + number, 1)]


def _inline(work: Callable[[Any], None], ref: Any) -> None:
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda _, ref: work(ref))(ref)


def _tell(refs: Refs, number: int) -> None:
    """This block has written all that it has of a link."""

    def tell(counter: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        hopper_counters.asm(None, [], "fence.proxy.async;", "")
        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            hopper_counters.asm(None, [utils.memref_ptr(counter)], "red.release.gpu.global.add.u32 [$0], 1;", "l")

    _inline(tell, _counter(refs, number))


def _await(plan: Plan, refs: Refs, number: int) -> None:
    """Wait for all blocks to have written their part of the link before."""

    def wait(counter: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, scf

        word = ir.IntegerType.get_signless(32)
        loop = scf.WhileOp([], [])
        with ir.InsertionPoint(loop.before.blocks.append()):
            found = hopper_counters.asm(word, [utils.memref_ptr(counter)], "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l")
            scf.condition(arith.cmpi(arith.CmpIPredicate.ult, found, utils.c(plan.workers, word)), [])
        with ir.InsertionPoint(loop.after.blocks.append()):
            scf.yield_([])
        hopper_counters.asm(None, [], "fence.proxy.async;", "")
        utils.warpgroup_barrier()

    _inline(wait, _counter(refs, number - 1))


def _clear(refs: Refs, links: int) -> None:
    """Leave the links' counters as they were found; all blocks are done."""

    def clear(counters: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        word = ir.IntegerType.get_signless(32)
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            for number in range(links - 1):
                llvm.store(utils.c(0, word), utils.getelementptr(utils.memref_ptr(counters), [hopper_counters.FIRST + number], word))

    _inline(clear, refs.counters)
