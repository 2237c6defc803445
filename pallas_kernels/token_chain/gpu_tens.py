"""A chain of some tens of tokens in one kernel on Hopper GPUs (Pallas Mosaic GPU): weights are on their way while blocks of threads wait
for each other.

Tokens are at the left of the products and weights, as they are stored, at the right, where any multiple of 8 rows will do: so a weight
falls to the blocks in equal shares, nothing is folded or added up, and results lie in registers token by token. What all blocks read of
the inputs is as much as the weights are, so blocks in a cluster share each copy of them (multicast). A block has the same part of the
residual stream throughout, which stays in shared memory. Producers, norms and who waits for whom are as in `gpu_few`. A token's result
depends on that token, the weights and static shapes alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper, hopper_counters
from pallas_kernels.hopper import ACC, COLUMNS, ROWS, TILE, WHOLE
from pallas_kernels.hopper_folds import Link
from pallas_kernels.hopper_grid import roots
from pallas_kernels.hopper_links import swiglu
from pallas_kernels.hopper_tens_plan import COLUMNS as KEPT
from pallas_kernels.hopper_tens_plan import Plan, Sizes, padded, plan_of
from pallas_kernels.hopper_token import THREADS
from pallas_kernels.token_chain import gpu_several
from pallas_kernels.token_chain.gpu_several import Kernel
from pallas_kernels.token_chain.reference import Weight

CONSUMER, PRODUCER = 232, 40  # registers of a thread
SWIZZLED = 16  # numbers of a row, or a multiple, that can be


class Scratch(NamedTuple):
    """Shared memory: weights by the depth of a slot, inputs by its breadth, results by their width; the residual stream; a number for each
    thread, factors of tokens, what a count was."""

    ring: dict[int, Any]
    inputs: dict[int, Any]
    made: dict[int, Any]
    partial: Any
    factors: Any
    told: Any
    full: Any
    free: Any
    there: Any
    used: Any
    stream: Any = None
    held: Any = None


class Refs(NamedTuple):
    """Memory: inputs, then what is written. passed: what each link but the last passes on; squares: of each block, before a norm."""

    x: Any
    held: Any
    weights: tuple[Any, ...]
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
    sizes = Sizes(1) if hopper.interpreting() else sizes

    def launch(value: Array, total: Array | None, weights: Sequence[Weight], *given: Any, **static: Any) -> tuple[Array, Array | None]:
        return _run(value, total, tuple(weight.values for weight in weights), *given, **static)

    kernel = Kernel(padded, lambda links, tokens: plan_of(links, tokens, x.dtype, sizes), launch)
    return gpu_several.run(kernel, x, held, weights, norms, links, counters)


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"] | None,
    weights: tuple[Float[Array, "_ _"], ...],
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
    squares = tuple(shaped((plan.workers * TILE,), jnp.float32) for _ in plan.before_norms)
    made = (shaped((plan.tokens, plan.links[-1].results), plan.dtype), *total, passed, squares)
    given = (x, *([] if held is None else [held]), weights, norms, *([] if counters is None else [counters]))

    def body(*refs: Any) -> None:
        left = iter(refs)
        x, held = next(left), next(left) if total else None
        weights, norms = next(left), next(left)
        shared, out, stream = None if counters is None else next(left), next(left), next(left) if total else None
        passed, squares = next(left), dict(zip(plan.before_norms, next(left), strict=True))
        _body(plan, Refs(x, held, weights, norms, shared, out, stream, passed, squares), _named(plan, next(left)))

    kernel = hopper.kernel(
        body, _scratch(plan), out_type=made, grid={"group": plan.workers // plan.sharing},
        cluster={"member": plan.sharing} if plan.sharing > 1 else {}, registers=[CONSUMER, PRODUCER, PRODUCER],
    )  # fmt: skip
    out, *stream = kernel(*given)[: 1 + len(total)]
    return out, stream[0] if total else held


def _scratch(plan: Plan) -> tuple[Any, ...]:
    slots = max(map(plan.slots, plan.breadths))
    ring = [hopper.swizzled((plan.stages, plan.slot_rows // deep, KEPT * deep), plan.dtype) for deep in plan.depths]
    inputs = [hopper.swizzled((plan.slots(wide), TILE, KEPT * wide), plan.dtype) for wide in plan.breadths]
    used = plgpu.Barrier(num_barriers=slots)
    if plan.sharing > 1:
        used = plgpu.ClusterBarrier(collective_axes=("member",), num_barriers=slots)
    made = (
        plgpu.RefUnion(*ring),
        plgpu.RefUnion(*inputs),
        plgpu.RefUnion(*(_tile(plan, width) for width in plan.widths)),
        plgpu.SMEM((THREADS,), jnp.float32),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=slots),
        used,
    )
    return (*made, _tile(plan, plan.streamed), plgpu.Barrier()) if plan.streamed else made


def _tile(plan: Plan, width: int) -> Any:
    """Shared memory for a block's numbers of each token: swizzled where rows are such that there is a swizzle."""
    return hopper.swizzled((TILE, width), plan.dtype) if width % SWIZZLED == 0 else plgpu.SMEM((TILE, width), plan.dtype)


def _named(plan: Plan, made: tuple[Any, ...]) -> Scratch:
    ring, inputs, results, *others = made
    named = ((plan.depths, ring), (plan.breadths, inputs), (plan.widths, results))
    return Scratch(*(dict(zip(names, views, strict=True)) for names, views in named), *others)


def _worker(plan: Plan) -> Any:
    group = lax.axis_index("group")
    return group * plan.sharing + lax.axis_index("member") if plan.sharing > 1 else group


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    warpgroup, links = lax.axis_index("wg"), range(len(plan.links))

    @pl.when(warpgroup == 0)
    def _consumer() -> None:
        plgpu.set_max_registers(CONSUMER, action="increase")
        if refs.held is not None:
            rows = pl.ds(_worker(plan) * plan.streamed, plan.streamed)
            plgpu.copy_gmem_to_smem(refs.held.at[:, rows], scratch.stream.at[pl.ds(0, plan.tokens)], scratch.held)
        for number in links:
            _link(plan, refs, scratch, number)
        if refs.counters is not None:
            done = hopper_counters.last(refs.counters, hopper_counters.FIRST + len(links), plan.workers, scratch.told)
            pl.when(done)(lambda: hopper_counters.clear(refs.counters, len(links)))

    @pl.when(warpgroup == 1)
    def _weights() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        for number in links:
            lax.fori_loop(0, plan.length(number) * plan.halves(number), _each(_weight, plan, refs, scratch, number), None)
        hopper.drain(lambda slot: scratch.free.at[slot], plan.begins[-1], plan.stages)

    @pl.when(warpgroup == 2)
    def _inputs() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        for number in links:
            if number:
                hopper_counters.wait(refs.counters, number - 1, plan.workers)
            lax.fori_loop(0, plan.taken(number), _each(_input, plan, refs, scratch, number), None)
            hopper.drain(lambda slot: scratch.used.at[slot], plan.taken(number), plan.slots(plan.wide(number)))


def _each(work: Callable[..., None], *given: Any) -> Callable[[Any, None], None]:
    """The body of a loop."""
    return lambda place, _: work(*given, place)


def _weight(plan: Plan, refs: Refs, scratch: Scratch, number: int, used: Any) -> None:
    """Copy a slot of a link's weight, the halves of a gated one's in turns."""
    size, deep, halves = plan.size(number), plan.deep(number), plan.halves(number)
    total, place = plan.begins[number] + used, lax.div(used, jnp.int32(halves))
    slot, columns = lax.rem(total, jnp.int32(plan.stages)), pl.ds(place * (KEPT * deep), KEPT * deep)
    pl.when(total >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    rows = pl.ds(lax.rem(used, jnp.int32(halves)) * plan.links[number].results + _worker(plan) * size, size)
    plgpu.copy_gmem_to_smem(refs.weights[number].at[rows, columns], scratch.ring[deep].at[slot].at[pl.ds(0, size)], scratch.full.at[slot])


def _input(plan: Plan, refs: Refs, scratch: Scratch, number: int, place: Any) -> None:
    """Copy a slot of a link's inputs, for all blocks of a cluster, once all of them have used what was there."""
    given, wide = refs.x if number == 0 else refs.passed[number - 1], plan.wide(number)
    slot, columns = lax.rem(place, jnp.int32(plan.slots(wide))), pl.ds(place * (KEPT * wide), KEPT * wide)
    pl.when(place >= plan.slots(wide))(lambda: plgpu.barrier_wait(scratch.used.at[slot]))
    target = scratch.inputs[wide].at[slot].at[pl.ds(0, plan.tokens)]
    plgpu.copy_gmem_to_smem(given.at[:, columns], target, scratch.there.at[slot], collective_axes="member" if plan.sharing > 1 else None)


def _link(plan: Plan, refs: Refs, scratch: Scratch, number: int) -> None:
    """What the consumer does for a link."""
    if plan.links[number].normed:
        hopper_counters.wait(refs.counters, number - 1, plan.workers)
        roots(refs.squares[number - 1], scratch.partial, scratch.factors, plan.links[number].inputs, plan.links[number].epsilon or 0.0)
    accumulators = [ACC((TILE, plan.size(number)), jnp.float32)] * plan.halves(number)
    parts = pl.run_scoped(partial(_products, plan, scratch, number), *accumulators)
    if plan.links[number].normed:
        factors = hopper.spread(hopper.load(scratch.factors, ROWS, coalesced=False), (TILE, plan.size(number)))
        parts = [part * factors for part in parts]
    value = (swiglu(plan.dtype, *parts) if plan.links[number].gated else parts[0]).astype(plan.dtype)
    rows = pl.ds(_worker(plan) * plan.size(number), plan.size(number))
    if number in plan.before_norms:
        value = _streamed(plan, refs, scratch, number, rows, value)
    _write(plan, scratch, (refs.out if number + 1 == len(plan.links) else refs.passed[number]).at[:, rows], value)
    if number + 1 < len(plan.links):
        hopper_counters.tell(refs.counters, number)


def _products(plan: Plan, scratch: Scratch, number: int, *accumulators: Any) -> list[Any]:
    """This worker's sums: products of a slot of inputs are on their way while the next one is waited for."""
    deep, wide, halves, size = plan.deep(number), plan.wide(number), plan.halves(number), plan.size(number)
    turns, width = deep // wide, KEPT * wide

    def slot(place: Any, half: int) -> Any:
        return lax.rem(plan.begins[number] + place * halves + half, jnp.int32(plan.stages))

    def here(place: Any, turn: int) -> Any:
        return lax.rem(place * turns + turn, jnp.int32(plan.slots(wide)))

    def free(place: Any) -> None:
        for half in range(halves):
            plgpu.barrier_arrive(scratch.free.at[slot(place, half)])
        plgpu.barrier_arrive(scratch.used.at[here(place, turns - 1)])

    def step(place: Any, _: None) -> None:
        for turn in range(turns):
            plgpu.barrier_wait(scratch.there.at[here(place, turn)])
            for half, accumulator in enumerate(accumulators):
                if turn == 0:
                    plgpu.barrier_wait(scratch.full.at[slot(place, half)])
                rows = scratch.ring[deep].at[slot(place, half)].at[pl.ds(0, size), pl.ds(turn * width, width)]
                plgpu.wgmma(accumulator, scratch.inputs[wide].at[here(place, turn)], rows.transpose((1, 0)))
            plgpu.wgmma_wait(halves)
            if turn:
                plgpu.barrier_arrive(scratch.used.at[here(place, turn - 1)])
            else:
                pl.when(place > 0)(lambda: free(place - 1))

    lax.fori_loop(0, plan.length(number), step, None)
    found = [accumulator[...] for accumulator in accumulators]
    free(plan.length(number) - 1)
    return found


def _streamed(plan: Plan, refs: Refs, scratch: Scratch, number: int, rows: Any, value: Any) -> Any:
    """Add results to the residual stream; what the next link is given, but for the root mean square."""
    order, offset = plan.before_norms.index(number), plan.links[number + 1].offset
    if order == 0:
        plgpu.barrier_wait(scratch.held)
    before = hopper.load(scratch.stream, WHOLE, coalesced=False)
    stream = (before.astype(jnp.float32) + value.astype(jnp.float32)).astype(plan.dtype)
    hopper.store(scratch.stream, stream)
    if number == plan.before_norms[-1]:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.stream.at[pl.ds(0, plan.tokens)], refs.total.at[:, rows])
    wide, norm = stream.astype(jnp.float32), hopper.load(refs.norms[order].at[rows], COLUMNS, coalesced=False).astype(jnp.float32)
    hopper.store(refs.squares[number].at[pl.ds(_worker(plan) * TILE, TILE)], (wide * wide).sum(axis=1))
    weights = lax.broadcast_in_dim(norm + offset if offset else norm, wide.shape, [1])
    return (wide * weights).astype(plan.dtype)


def _write(plan: Plan, scratch: Scratch, target: Any, value: Any) -> None:
    """Write results, by way of shared memory."""
    made = scratch.made[value.shape[1]]
    hopper.store(made, value)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(made.at[pl.ds(0, plan.tokens)], target)
    plgpu.wait_smem_to_gmem(0)
