"""Matmuls of one token that follow one another, in one kernel on Hopper GPUs (Pallas Mosaic GPU): the memory never waits for one to end.

Each multiprocessor has one block of threads from the first link to the last. A weight's rows are cut into tiles, which are dealt out by
their number. A producer copies blocks of this block's tiles into a ring of slots (TMA), those of the next links as well, since weights
depend on nothing; a consumer multiplies them with the token (`hopper_token`). Every result of a link is an input of the next, so each block
waits for all results (`hopper_mail`), adds them to the residual stream and normalises it for itself. The first block writes the stream.

All blocks must run at once: there are no more of them than multiprocessors (under CUDA's MPS, where processes share these, they may not). A
link on its own is the whole kernel without mail; so the interpreter, which knows none, runs the links one by one.
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

from pallas_kernels import hopper, hopper_counters, hopper_token
from pallas_kernels.hopper import ACC, TILE
from pallas_kernels.hopper_folds import Link, Plan
from pallas_kernels.hopper_mail import Mail
from pallas_kernels.hopper_token import Fold, Piece, columns_of, pieces_of, places_of, together

REGISTERS = [232, 40]  # of a thread: of the consumer and of the producer


class Scratch(NamedTuple):
    """Shared memory: the ring, once for each width of a block; the token, once for each shape; sums of products, once for each number of
    columns; barriers of the slots."""

    ring: dict[int, Any]
    token: dict[tuple[int, int, int], Any]
    sums: dict[int, Any]
    full: Any
    free: Any


class Refs(NamedTuple):
    """Memory: inputs, then what is written. total: the residual stream behind the last norm, if there is one."""

    x: Any
    held: Any
    weights: tuple[Any, ...]
    scales: tuple[Any, ...]
    norms: tuple[Any, ...]
    counters: Any
    out: Any
    total: Any


def run(
    x: Float[Array, "in"],
    held: Float[Array, "features"] | None,
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    counters: Any,
    *,
    plan: Plan,
) -> tuple[Array, Array | None]:
    """The last link's results, and the residual stream behind the last norm. counters: the program's (`hopper_counters`), if there are
    several links; held: the stream before, if there is a norm."""
    found = [tuple(given for given in each if given is not None) for each in (scales, norms)]
    return _run(x, held, tuple(weights), *found, counters, plan=plan, interpreted=hopper.interpreting())


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _run(
    x: Float[Array, "in"],
    held: Float[Array, "features"] | None,
    weights: tuple[Shaped[Array, "_ _"], ...],
    scales: tuple[Float[Array, "_"], ...],
    norms: tuple[Float[Array, "_"], ...],
    counters: Any,
    *,
    plan: Plan,
    interpreted: bool,
) -> tuple[Array, Array | None]:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    normed, several = any(link.normed for link in plan.links), len(plan.links) > 1
    given = (x, *([held] if normed else []), weights, scales, norms, *([counters] if several else []))
    made = (
        jax.ShapeDtypeStruct((plan.links[-1].results,), plan.made),
        *([jax.ShapeDtypeStruct(x.shape if held is None else held.shape, plan.dtype)] * normed),
    )

    def body(*refs: Any) -> None:
        left = iter(refs)
        x, held = next(left), next(left) if normed else None
        weights, scales, norms = next(left), next(left), next(left)
        shared, out, total = next(left) if several else None, next(left), next(left) if normed else None
        _body(plan, Refs(x, held, weights, scales, norms, shared, out, total), _named(plan, next(left)))

    kernel = hopper.kernel(body, _scratch(plan), out_type=made, grid={"worker": plan.workers}, registers=REGISTERS)
    out, *total = kernel(*given)
    return out, total[0] if normed else held


def _scratch(plan: Plan) -> tuple[Any, ...]:
    size = jnp.dtype(plan.stored).itemsize
    rings = [hopper.swizzled((plan.stages, plan.slot // (block * size), block), plan.stored) for block in plan.blocks]
    tokens = [hopper.swizzled(shape, plan.stored) for shape in plan.rooms]
    sums = [plgpu.SMEM((TILE, columns), plan.right.sums) for columns in plan.columns]
    unions = (plgpu.RefUnion(*each) if len(each) > 1 else tuple(each) for each in (rings, tokens, sums))
    return *unions, plgpu.Barrier(num_barriers=plan.stages, num_arrivals=_copies(plan)), plgpu.Barrier(num_barriers=plan.stages)


def _named(plan: Plan, made: tuple[Any, ...]) -> Scratch:
    ring, token, sums, full, free = made
    return Scratch(
        dict(zip(plan.blocks, ring, strict=True)),
        dict(zip(plan.rooms, token, strict=True)),
        dict(zip(plan.columns, sums, strict=True)),
        full,
        free,
    )


def _copies(plan: Plan) -> int:
    """Copies that fill a slot, at most."""
    return max(fold.parts * (2 if link.gated else 1) for link, fold in zip(plan.links, plan.folds, strict=True))


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    mine = [lax.div(plan.tiles(number) - worker + plan.workers - 1, jnp.int32(plan.workers)) for number in range(len(plan.links))]
    begins, ahead = [], jnp.int32(0)
    for fold, count in zip(plan.folds, mine, strict=True):
        begins.append(ahead)
        ahead = ahead + count * fold.length

    @pl.when(warpgroup == 0)
    def _consumer() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        mail = None if refs.counters is None else Mail.of(refs.counters)
        for number in range(len(plan.links)):
            factor = _enter(plan, refs, scratch, number, mail)
            if mail is not None and number == 0:
                mail.clear(worker, plan.workers)
            consume = partial(_consume, plan, refs, scratch, number, mail, factor)
            lax.fori_loop(0, mine[number], lambda index, _, run=consume, begin=begins[number]: run(begin, index), None)
        if refs.counters is not None:
            hopper_counters.leave(refs.counters, plan.workers)

    @pl.when(warpgroup == 1)
    def _producer() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        for number, fold in enumerate(plan.folds):
            produce = partial(_produce, plan, refs, scratch, number)
            lax.fori_loop(0, mine[number] * fold.length, lambda used, _, run=produce, begin=begins[number]: run(begin, used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], ahead, plan.stages)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, number: int, begin: Any, used: Any) -> None:
    """Copy a block of each part of a tile; `begin` counts the blocks of the links before, `used` those of this one."""
    link, fold, weight = plan.links[number], plan.folds[number], refs.weights[number]
    tile = lax.axis_index("worker") + lax.div(used, jnp.int32(fold.length)) * plan.workers
    column = lax.rem(used, jnp.int32(fold.length)) * fold.block
    slot = lax.rem(begin + used, jnp.int32(plan.stages))
    pl.when(begin + used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    if plan.flying < plan.stages:
        landed = scratch.full.at[lax.rem(begin + used + plan.stages - plan.flying, jnp.int32(plan.stages))]
        pl.when(begin + used >= plan.flying)(lambda: plgpu.barrier_wait(landed))
    target, full, halves = scratch.ring[fold.block].at[slot], scratch.full.at[slot], 2 if link.gated else 1
    size = fold.rows // halves
    for part in range(fold.parts):
        for half in range(halves):
            block = weight.at[pl.ds(half * link.results + tile * size, size), pl.ds(part * fold.part + column, fold.block)]
            plgpu.copy_gmem_to_smem(block, target.at[pl.ds(part * fold.rows + half * size, size)], full)
    for _ in range(_copies(plan) - fold.parts * halves):
        plgpu.barrier_arrive(full)  # in place of a copy


def _enter(plan: Plan, refs: Refs, scratch: Scratch, number: int, mail: Mail | None) -> Any:
    """Make a link's inputs the right side of its products; the factor that its results are multiplied by."""
    link, fold = plan.links[number], plan.folds[number]
    put = partial(plan.right.put, fold=fold, room=scratch.token[hopper_token.room(plan.right, fold)])
    if link.epsilon is None:
        return put(_given(plan, refs, number, mail))
    stream = _stream(plan, refs, number, mail)
    weights = pieces_of(refs.norms[_norms_before(plan, number)])  # all that need not wait is loaded first
    pieces = _added(plan, stream, _given(plan, refs, number, mail))
    if not any(later.normed for later in plan.links[number + 1 :]):
        pl.when(lax.axis_index("worker") == 0)(partial(_write, refs.total, pieces))
    wide = [values.astype(jnp.float32) for _, values in pieces]
    squares = together(jnp.add, jnp.sum, [values * values for values in wide])
    root = lax.rsqrt(squares * (1.0 / link.inputs) + link.epsilon)
    return put(
        [
            Piece(place, _normed(plan, link, values * root, weight.astype(jnp.float32)))
            for values, (place, weight) in zip(wide, weights, strict=True)
        ]
    )


def _write(ref: Any, pieces: list[Piece]) -> None:
    for place, values in pieces:
        ref.at[place][...] = values


def _stream(plan: Plan, refs: Refs, number: int, mail: Mail | None) -> list[Piece]:
    """The residual stream that a link's inputs are added to: with what all earlier ones with a norm were given."""
    found = pieces_of(refs.held)
    for earlier in range(number):
        if plan.links[earlier].normed:
            found = _added(plan, found, _given(plan, refs, earlier, mail))
    return found


def _added(plan: Plan, held: list[Piece], given: list[Piece]) -> list[Piece]:
    """Sums, rounded as the stream is."""
    sums = [one.values.astype(jnp.float32) + other.values.astype(jnp.float32) for one, other in zip(held, given, strict=True)]
    return [Piece(piece.place, values.astype(plan.dtype)) for piece, values in zip(held, sums, strict=True)]


def _given(plan: Plan, refs: Refs, number: int, mail: Mail | None) -> list[Piece]:
    """What a link is given: x, or all results of the link before, once they are there."""
    if mail is None or not number:
        return pieces_of(refs.x)
    places = places_of(plan.links[number].inputs)
    return [Piece(*piece) for piece in zip(places, mail.take(_first(plan, number - 1), places, plan.dtype), strict=True)]


def _first(plan: Plan, number: int) -> int:
    """Where a link's results begin among all that are sent."""
    return sum(link.results for link in plan.links[:number])


def _norms_before(plan: Plan, number: int) -> int:
    return sum(link.normed for link in plan.links[:number])


def _normed(plan: Plan, link: Link, scaled: Any, weight: Any) -> Any:
    """Rounded as the norm is on its own."""
    if link.offset:
        return (scaled * (weight + link.offset)).astype(plan.dtype)
    return (scaled.astype(plan.dtype).astype(jnp.float32) * weight).astype(plan.dtype)


def _consume(plan: Plan, refs: Refs, scratch: Scratch, number: int, mail: Any, factor: Any, begin: Any, index: Any) -> None:
    """The results of this worker's next tile of a link."""
    link, fold, tile = plan.links[number], plan.folds[number], lax.axis_index("worker") + index * plan.workers
    columns, size = columns_of(plan.right, fold), fold.rows // (2 if link.gated else 1)
    scales = [_scales(refs, number, pl.ds(start + tile * size, size)) for start in range(0, link.outputs, link.results)]

    def accumulate(accumulator: Any) -> None:
        first = begin + index * fold.length
        lax.fori_loop(0, fold.length, lambda place, _: _add_block(plan, fold, accumulator, scratch, first, place), None)
        hopper.store(scratch.sums[columns], accumulator[...])

    pl.run_scoped(accumulate, ACC((TILE, columns), plan.right.sums))
    plgpu.commit_smem()
    sums = [hopper_token.meeting(fold, plan.right, scratch.sums[columns], half * size, size) for half in range(len(scales))]
    found = [part * scale * factor for part, scale in zip(sums, scales, strict=True)]  # a small factor last: the scale alone may be lost
    result = swiglu(plan.dtype, *found) if link.gated else found[0]
    if number < len(plan.links) - 1:
        mail.post(_first(plan, number) + tile * size, result.astype(plan.dtype), size)
    else:
        hopper_token.leave(refs.out.at[pl.ds(tile * size, size)], result.astype(plan.made))


def swiglu(dtype: Any, gate: Any, up: Any) -> Any:
    """silu(gate) * up of a gated link's two results, each rounded to the dtype first; float32."""
    gate, up = (values.astype(dtype).astype(jnp.float32) for values in (gate, up))
    return gate / (1.0 + jnp.exp(-gate)) * up


def _scales(refs: Refs, number: int, rows: Any) -> Any:
    return hopper_token.own(refs.scales[number].at[rows]).astype(jnp.float32) if refs.scales else 1.0


def _add_block(plan: Plan, fold: Fold, accumulator: Any, scratch: Scratch, first: Any, place: Any) -> None:
    slot = lax.rem(first + place, jnp.int32(plan.stages))
    token = scratch.token[hopper_token.room(plan.right, fold)].at[place]
    plgpu.barrier_wait(scratch.full.at[slot])
    plgpu.wgmma(accumulator, scratch.ring[fold.block].at[slot, pl.ds(0, TILE)], token.transpose((1, 0)))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch.free.at[slot])
