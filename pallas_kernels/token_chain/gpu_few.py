"""A chain of a few tokens in one kernel on Hopper GPUs (Pallas Mosaic GPU): weights are on their way while blocks of threads wait for each
other.

A weight's rows are cut into tiles, folded where that deals them out more evenly (`hopper_token.Fold`), and each block of threads computes
all its tiles of a link at once, whole: so inputs are read once for them, and no sums come in parts. One producer copies weights, those of
the next links as well, since they depend on nothing. Another copies inputs, once all blocks have said that they have written theirs. What
comes before a norm is multiplied by its weight where it is written; the root mean square is one factor for a token's results, worked out
from squares that each tile leaves, summed in order. A token's result depends on that token, the weights and static shapes alone.

int8 weights stay as they are stored. Of what a block of threads copies of inputs, further warpgroups make limbs (`hopper_limbs`), where it
lies, and the products of a slot are added to sums in registers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels import hopper, hopper_counters, hopper_limbs
from pallas_kernels.hopper import ACC, TILE
from pallas_kernels.hopper_few_plan import Plan, Sizes, padded, plan_of
from pallas_kernels.hopper_folds import Link
from pallas_kernels.hopper_grid import Grid, met, roots
from pallas_kernels.hopper_limbs import LIMBS
from pallas_kernels.hopper_links import swiglu
from pallas_kernels.hopper_token import THREADS
from pallas_kernels.token_chain import gpu_several
from pallas_kernels.token_chain.gpu_several import Kernel
from pallas_kernels.token_chain.reference import Weight

PRODUCER, CUTTER = 40, 96  # registers of a thread
CONSUMER = (232, 232, 208)  # by how many cut inputs
FIRST_CUTTER = 3  # warpgroup, behind the consumer and the producers of weights and of inputs


class Scratch(NamedTuple):
    """Shared memory: weights; inputs, their limbs if there are any, and sums, once for each shape; a number for each thread, factors of
    tokens, what a count was. sizes: what limbs are multiplied by."""

    ring: Any
    inputs: dict[int, Any]
    limbs: dict[int, Any]
    sums: dict[tuple[int, int], Any]
    partial: Any
    factors: Any
    told: Any
    full: Any
    free: Any
    there: Any
    used: Any
    sizes: Any = None
    cut: Any = None


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


def run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    links: Sequence[Link],
    counters: Any,
    sizes: Sizes,
) -> tuple[Array, Array]:
    """See `gpu_several.run`."""
    stored = weights[0].values.dtype

    def launch(value: Array, total: Array | None, weights: Sequence[Weight], *given: Any, **static: Any) -> tuple[Array, Array | None]:
        return _run(value, total, tuple(weight.values for weight in weights), _scales(weights), *given, **static)

    kernel = Kernel(padded, lambda links, tokens: plan_of(links, tokens, x.dtype, stored, sizes), launch)
    return gpu_several.run(kernel, x, held, weights, norms, links, counters)


def _scales(weights: Sequence[Weight]) -> tuple[Float[Array, "out"], ...]:
    """Of int8 weights."""
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
    shaped = jax.ShapeDtypeStruct
    total = [] if held is None else [shaped(held.shape, plan.dtype)]
    passed = tuple(shaped((plan.tokens, link.results), plan.dtype) for link in plan.links[:-1])
    squares = tuple(shaped((plan.tiles(number) * plan.squares(number),), jnp.float32) for number in plan.before_norms)
    made = (shaped((plan.tokens, plan.links[-1].results), plan.dtype), *total, passed, squares)
    given = (x, *([] if held is None else [held]), weights, scales, norms, *([] if counters is None else [counters]))

    def body(*refs: Any) -> None:
        left = iter(refs)
        x, held = next(left), next(left) if total else None
        weights, scales, norms = next(left), next(left), next(left)
        shared, out, stream = None if counters is None else next(left), next(left), next(left) if total else None
        passed, squares = next(left), dict(zip(plan.before_norms, next(left), strict=True))
        _body(plan, Refs(x, held, weights, scales, norms, shared, out, stream, passed, squares), _named(plan, next(left)))

    registers = [CONSUMER[plan.cutters], PRODUCER, PRODUCER, *[CUTTER] * plan.cutters]
    kernel = hopper.kernel(body, _scratch(plan), out_type=made, grid={"worker": plan.workers}, registers=registers)
    out, *stream = kernel(*given)[: 1 + len(total)]
    return out, stream[0] if total else held


def _shapes(plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
    """The columns of inputs, and how many tiles of how many columns sums have."""
    links = range(len(plan.links))
    return list(dict.fromkeys(map(plan.columns, links))), list(dict.fromkeys((plan.most(link), plan.met(link)) for link in links))


def _scratch(plan: Plan) -> tuple[Any, ...]:
    columns, sums = _shapes(plan)
    slots, block = max(map(plan.slots, range(len(plan.links)))), plan.block
    shapes = [(plan.room // (each * block * 2), each, block) for each in columns]
    inputs = [plgpu.SMEM(shape, plan.dtype) if plan.limbs else hopper.swizzled(shape, plan.dtype) for shape in shapes]
    limbs = [hopper.swizzled((count, LIMBS * each, block), plan.stored) for count, each, _ in shapes if plan.limbs]
    tiles = [plgpu.SMEM((count, each, TILE), jnp.float32) for count, each in sums]
    made = (
        hopper.swizzled((plan.stages, TILE, block), plan.stored),
        plgpu.RefUnion(*inputs, *limbs, *tiles),
        plgpu.SMEM((THREADS,), jnp.float32),
        plgpu.SMEM((plan.tokens,), jnp.float32),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.copies),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=slots, num_arrivals=plan.parts),
        plgpu.Barrier(num_barriers=slots),
    )
    if not plan.limbs:
        return made
    return *made, plgpu.SMEM((plan.room // (block * 2),), jnp.float32), plgpu.Barrier(num_barriers=slots, num_arrivals=plan.cutters)


def _named(plan: Plan, made: tuple[Any, ...]) -> Scratch:
    ring, room, *others = made
    columns, sums = _shapes(plan)
    inputs, rest = dict(zip(columns, room, strict=False)), room[len(columns) :]
    limbs, tiles = (dict(zip(columns, rest, strict=False)), rest[len(columns) :]) if plan.limbs else ({}, rest)
    return Scratch(ring, inputs, limbs, dict(zip(sums, tiles, strict=True)), *others)


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    links, begins, ahead = range(len(plan.links)), [], jnp.int32(0)
    mine = [lax.div(plan.tiles(number) - worker + plan.workers - 1, jnp.int32(plan.workers)) for number in links]
    for fold, count in zip(plan.folds, mine, strict=True):
        begins.append(ahead)
        ahead = ahead + count * fold.length

    @pl.when(warpgroup == 0)
    def _consumer() -> None:
        plgpu.set_max_registers(CONSUMER[plan.cutters], action="increase")
        for number in links:
            _link(plan, refs, scratch, number, mine[number], begins[number])
        if refs.counters is not None:
            done = hopper_counters.last(refs.counters, hopper_counters.FIRST + len(links), plan.workers, scratch.told)
            pl.when(done)(lambda: hopper_counters.clear(refs.counters, len(links)))

    @pl.when(warpgroup == 1)
    def _weights() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        for number in links:
            run = partial(_weight, plan, refs, scratch, number, begins[number], mine[number])
            lax.fori_loop(0, mine[number] * plan.folds[number].length, lambda used, _, run=run: run(used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], ahead, plan.stages)

    @pl.when(warpgroup == 2)
    def _inputs() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        for number, fold in enumerate(plan.folds):
            count = jnp.where(mine[number] > 0, fold.length, 0)
            if number:  # who copies nothing must not look: it might do so when the last block has left zeros
                pl.when(count > 0)(partial(hopper_counters.wait, refs.counters, number - 1, plan.workers))
            run = partial(_input, plan, refs, scratch, number)
            lax.fori_loop(0, count, lambda used, _, run=run: run(used), None)
            hopper.drain(lambda slot: scratch.used.at[slot], count, plan.slots(number))

    for share in range(plan.cutters):
        pl.when(warpgroup == FIRST_CUTTER + share)(partial(_cutter, plan, scratch, share, mine))


def _link(plan: Plan, refs: Refs, scratch: Scratch, number: int, mine: Any, begin: Any) -> None:
    """What the consumer does for a link of which it has `mine` tiles; blocks before it: `begin`."""
    if plan.links[number].normed:
        hopper_counters.wait(refs.counters, number - 1, plan.workers)
        roots(refs.squares[number - 1], scratch.partial, scratch.factors, plan.links[number].inputs, plan.links[number].epsilon or 0.0)
    for count in sorted({plan.most(number), plan.tiles(number) // plan.workers} - {0}):
        pl.when(mine == count)(partial(_multiply, plan, refs, scratch, number, count, begin))
    if number + 1 < len(plan.links):
        hopper_counters.tell(refs.counters, number)


def _cutter(plan: Plan, scratch: Scratch, share: int, mine: Sequence[Any]) -> None:
    """What a warpgroup does that makes limbs."""
    plgpu.set_max_registers(CUTTER, action="decrease")
    for number, fold in enumerate(plan.folds):
        run = partial(_limbs, plan, scratch, number, share)
        lax.fori_loop(0, jnp.where(mine[number] > 0, fold.length, 0), lambda used, _, run=run: run(used), None)


def _weight(plan: Plan, refs: Refs, scratch: Scratch, number: int, begin: Any, mine: Any, used: Any) -> None:
    """Copy a block of each part of a tile; `begin` counts the blocks of the links before, `used` those of this one."""
    link, fold, weight = plan.links[number], plan.folds[number], refs.weights[number]
    tile = lax.axis_index("worker") + lax.rem(used, mine) * plan.workers
    column, total = lax.div(used, mine) * plan.block, begin + used
    slot = lax.rem(total, jnp.int32(plan.stages))
    pl.when(total >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    landed = scratch.full.at[lax.rem(total + plan.stages - plan.flying, jnp.int32(plan.stages))]
    pl.when(total >= plan.flying)(lambda: plgpu.barrier_wait(landed))
    target, full, halves = scratch.ring.at[slot], scratch.full.at[slot], plan.halves(number)
    size = fold.rows // halves
    for part in range(fold.parts):
        for half in range(halves):
            block = weight.at[pl.ds(half * link.results + tile * size, size), pl.ds(part * fold.part + column, plan.block)]
            plgpu.copy_gmem_to_smem(block, target.at[pl.ds(part * fold.rows + half * size, size)], full)
    for _ in range(plan.copies - fold.parts * halves):
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
    for _ in range(plan.parts - fold.parts):
        plgpu.barrier_arrive(there)


def _limbs(plan: Plan, scratch: Scratch, number: int, share: int, used: Any) -> None:
    """Make limbs of a share of a slot of inputs, once that is there."""
    columns, slot = plan.columns(number), lax.rem(used, jnp.int32(plan.slots(number)))
    size = columns // plan.cutters
    inputs, limbs = scratch.inputs[columns].at[slot], scratch.limbs[columns].at[slot]
    plgpu.barrier_wait(scratch.there.at[slot])
    hopper_limbs.cut(
        inputs.at[pl.ds(share * size, size)],
        limbs.at[pl.ds(share * size * LIMBS, size * LIMBS)],
        scratch.sizes.at[pl.ds(slot * columns + share * size, size)],
    )
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.cut.at[slot])


def _multiply(plan: Plan, refs: Refs, scratch: Scratch, number: int, count: int, begin: Any) -> None:
    """All of this worker's `count` tiles of a link, and what comes of them."""
    sums = scratch.sums[plan.most(number), plan.met(number)]
    (_with_limbs if plan.limbs else _as_they_are)(plan, scratch, number, count, begin, sums)
    plgpu.commit_smem()
    lax.fori_loop(0, count, lambda index, _: _leave(plan, refs, scratch, number, index, sums.at[index]), None)
    plgpu.commit_smem()  # what was read there is written by copies next


def _as_they_are(plan: Plan, scratch: Scratch, number: int, count: int, begin: Any, sums: Any) -> None:
    """The tiles' sums, of inputs and weights of one dtype."""
    fold, columns, slots = plan.folds[number], plan.columns(number), plan.slots(number)

    def accumulate(*accumulators: Any) -> None:
        def step(place: Any, _: None) -> None:
            here = lax.rem(place, jnp.int32(slots))
            plgpu.barrier_wait(scratch.there.at[here])
            for index, accumulator in enumerate(accumulators):
                slot = lax.rem(begin + place * count + index, jnp.int32(plan.stages))
                plgpu.barrier_wait(scratch.full.at[slot])
                plgpu.wgmma(accumulator, scratch.ring.at[slot], scratch.inputs[columns].at[here].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch.free.at[slot])
            plgpu.barrier_arrive(scratch.used.at[here])

        lax.fori_loop(0, fold.length, step, None)
        for index, accumulator in enumerate(accumulators):
            hopper.store(sums.at[index].transpose((1, 0)), plgpu.layout_cast(accumulator[...], plgpu.Layout.WGMMA_TRANSPOSED))

    pl.run_scoped(accumulate, *[ACC((TILE, columns), jnp.float32)] * count)


def _with_limbs(plan: Plan, scratch: Scratch, number: int, count: int, begin: Any, sums: Any) -> None:
    """The tiles' sums, of limbs and int8 weights: those of a slot are integers, and added to floats."""
    fold, columns, slots = plan.folds[number], plan.columns(number), plan.slots(number)

    def step(place: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        here = lax.rem(place, jnp.int32(slots))
        plgpu.barrier_wait(scratch.cut.at[here])
        sizes, found = hopper_limbs.sizes_of(scratch.sizes.at[pl.ds(here * columns, columns)], fold), []
        for index, total in enumerate(totals):
            slot = lax.rem(begin + place * count + index, jnp.int32(plan.stages))
            plgpu.barrier_wait(scratch.full.at[slot])

            def products(accumulator: Any, slot: Any = slot) -> Any:
                plgpu.wgmma(accumulator, scratch.ring.at[slot], scratch.limbs[columns].at[here].transpose((1, 0)))
                return accumulator[...]

            made = pl.run_scoped(products, ACC((TILE, LIMBS * columns), jnp.int32))
            plgpu.barrier_arrive(scratch.free.at[slot])
            found.append(hopper_limbs.added(total, made, sizes, fold))
        plgpu.barrier_arrive(scratch.used.at[here])
        return tuple(found)

    totals = lax.fori_loop(0, fold.length, step, (hopper_limbs.nothing(plan.tokens),) * count)
    for index, total in enumerate(totals):
        hopper_limbs.leave(sums.at[index], total)


def _leave(plan: Plan, refs: Refs, scratch: Scratch, number: int, index: Any, sums: Any) -> None:
    """A tile's results: written, with its norm's weight if one comes next."""
    fold, tile = plan.folds[number], lax.axis_index("worker") + index * plan.workers
    size = fold.rows // plan.halves(number)
    grid, rows = Grid(plan.tokens, size), pl.ds(tile * size, size)
    value = _results(plan, refs, scratch, number, tile, sums)
    if number not in plan.before_norms:
        grid.store((refs.out if number + 1 == len(plan.links) else refs.passed[number]).at[:, rows], value)
        return
    order, offset = plan.before_norms.index(number), plan.links[number + 1].offset
    before = grid.load((refs.total if order else refs.held).at[:, rows])
    stream = (before.astype(jnp.float32) + value.astype(jnp.float32)).astype(plan.dtype)
    grid.store(refs.total.at[:, rows], stream)
    wide, norm = stream.astype(jnp.float32), grid.load(refs.norms[order].at[rows], (0, 1)).astype(jnp.float32)
    grid.store(refs.passed[number].at[:, rows], (wide * (norm + offset if offset else norm)).astype(plan.dtype))
    count = plan.squares(number)
    grid.store_sums(refs.squares[number].at[pl.ds(tile * count, count)], wide * wide)


def _results(plan: Plan, refs: Refs, scratch: Scratch, number: int, tile: Any, sums: Any) -> Any:
    """What a tile's sums come to, in the order of its grid, rounded."""
    link, fold, found = plan.links[number], plan.folds[number], []
    size = fold.rows // plan.halves(number)
    grid = Grid(plan.tokens, size)
    for half in range(plan.halves(number)):
        part = met(fold, grid, sums, half * size)
        if plan.limbs:
            part = part * grid.load(refs.scales[number].at[pl.ds(half * link.results + tile * size, size)], (0, 1)).astype(jnp.float32)
        found.append(part * grid.load(scratch.factors, (1, 0)) if link.normed else part)
    return (swiglu(plan.dtype, *found) if link.gated else found[0]).astype(plan.dtype)
