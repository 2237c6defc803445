"""A chain of a few tokens in one kernel on Hopper GPUs (Pallas Mosaic GPU): weights are on their way while blocks of threads wait for each
other.

A weight's rows are cut into tiles, folded where that deals them out more evenly (`hopper_token.Fold`), and each block of threads computes
all its tiles of a link at once, whole: so inputs are read once for them, and no sums come in parts. One producer copies weights, those of
the next links as well, since they depend on nothing. Another copies inputs, once all blocks have said that they have written theirs. What
comes before a norm is multiplied by its weight where it is written; the root mean square is one factor for a token's results, worked out
from squares that each tile leaves, summed in order. A token's result depends on that token, the weights and static shapes alone.
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
from jaxtyping import Array, Float

from pallas_kernels import dispatch, hopper, hopper_counters
from pallas_kernels.hopper import ACC, TILE
from pallas_kernels.hopper_folds import Link
from pallas_kernels.hopper_token import THREADS, Fold, thread
from pallas_kernels.norm import rms_norm

MOST, STEP = 16, 8  # tokens; they are filled up to a multiple
BLOCK = 128  # inputs of a slot
SLOT = TILE * BLOCK * 2  # bytes
PARTS = (1, 2, 4)
INPUTS = 65536  # bytes of shared memory for inputs, and for the sums of a link's tiles in turn
STAGES = 9  # slots of weights
FLYING = (4, 6, 9, 3)  # of them on their way at most: see `hopper_folds.Sizes`
REGISTERS = [232, 40, 40]  # of a thread: of the consumer, of the producers of weights and of inputs
FEWEST_WORKERS = 0.875  # of all multiprocessors


class Sizes(NamedTuple):
    """Slots of weights that are on their way at most."""

    flying: int = FLYING[0]


class Plan(NamedTuple):
    """Static shape: links and how the weight of each is folded, `workers` blocks of threads, tokens (a multiple of 8)."""

    links: tuple[Link, ...]
    folds: tuple[Fold, ...]
    workers: int
    tokens: int
    dtype: Any
    flying: int = FLYING[0]
    stages: int = STAGES

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
        return INPUTS // (self.columns(number) * BLOCK * 2)

    def before_norm(self, number: int) -> bool:
        """Whether the next link begins with a norm."""
        return number + 1 < len(self.links) and self.links[number + 1].normed


class Scratch(NamedTuple):
    """Shared memory: weights; inputs and sums, once for each shape; a number for each thread, factors of tokens, what a count was."""

    ring: Any
    inputs: dict[int, Any]
    sums: dict[tuple[int, int], Any]
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
    norms: tuple[Any, ...]
    counters: Any
    out: Any
    total: Any
    passed: tuple[Any, ...]
    squares: dict[int, Any]


def refusal(key: dispatch.Key) -> str | None:
    """Why it cannot run for what is known of a key; None when it can."""
    tokens, dtype = int(key["tokens"]), key.get("dtype")
    if not 1 < tokens <= MOST:
        return f"its kernel takes up to {MOST} tokens, not {tokens}"
    if dtype != "bfloat16" or key.get("weight") != dtype:
        return f"its kernel of several tokens takes tokens and weights in bfloat16, not {dtype} and {key.get('weight')}"
    for number in range(int(key.get("links", 0))):
        link = Link(int(key[f"in{number}"]), int(key[f"out{number}"]), gated=True)
        if not _folds(link, _padded(tokens)):
            return f"its kernel of several tokens takes inputs and outputs in multiples of 128 and 64, not {link.inputs} and {link.outputs}"
    return None


def _padded(tokens: int) -> int:
    return tokens + -tokens % STEP


def _folds(link: Link, tokens: int) -> list[Fold]:
    """The ways to fold a weight."""
    halves = 2 if link.gated else 1
    fitting = [parts for parts in PARTS if link.inputs % (parts * BLOCK) == 0 and link.outputs % (TILE // parts) == 0]
    return [Fold(link.inputs, parts, BLOCK) for parts in fitting if TILE // parts // halves * tokens % THREADS == 0]


def plan_of(links: Sequence[Link], tokens: int, dtype: Any, sizes: Sizes) -> Plan:
    """How weights are dealt out: so that the busiest workers have least to do, then in few parts, to few workers."""
    ways = [_folds(link, tokens) for link in links]

    def dealt(workers: int) -> tuple[tuple[int, int], Plan]:
        def busiest(link: Link, fold: Fold) -> int:
            return -(-link.outputs // fold.rows // workers) * fold.rows

        folds = [min(found, key=lambda fold: (busiest(link, fold), fold.parts)) for link, found in zip(links, ways, strict=True)]  # noqa: B023
        costs = [link.inputs * busiest(link, fold) for link, fold in zip(links, folds, strict=True)]
        return (sum(costs), workers), Plan(tuple(links), tuple(folds), workers, tokens, jnp.dtype(dtype), *sizes)

    cores = hopper.cores()
    return min(map(dealt, range(max(1, math.ceil(cores * FEWEST_WORKERS)), cores + 1)), key=lambda each: each[0])[1]


def run(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Float[Array, "_ _"]],
    norms: Sequence[Float[Array, "_"] | None],
    links: Sequence[Link],
    counters: Any,
    sizes: Sizes,
) -> tuple[Array, Array]:
    """The last link's results, and the residual stream behind the last norm. counters: the program's (`hopper_counters`)."""
    tokens = x.shape[0]
    value, total = (jnp.pad(each, ((0, -tokens % STEP), (0, 0))) for each in (x, held))
    if hopper.interpreting():
        for weight, norm, link in zip(weights, norms, links, strict=True):
            if norm is not None:
                total = total + value
                value = rms_norm(total, norm, epsilon=link.epsilon, offset=link.offset)
            plan = plan_of([link._replace(epsilon=None)], value.shape[0], x.dtype, sizes)
            value, _ = _run(value, None, (weight,), (), None, plan=plan, interpreted=True)
        return value[:tokens], total[:tokens]
    plan = plan_of(links, value.shape[0], x.dtype, sizes)
    found = tuple(norm for norm in norms if norm is not None)
    shared = hopper_counters.made() if counters is None else counters
    value, total = _run(value, total if found else None, tuple(weights), found, shared, plan=plan, interpreted=False)
    return value[:tokens], held if total is None else total[:tokens]


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
    links, shaped = range(len(plan.links)), jax.ShapeDtypeStruct
    normed, several = [number for number in links if plan.before_norm(number)], counters is not None
    made = (
        shaped((plan.tokens, plan.links[-1].results), plan.dtype),
        *([shaped(x.shape if held is None else held.shape, plan.dtype)] if normed else []),
        tuple(shaped((plan.tokens, link.results), plan.dtype) for link in plan.links[:-1]),
        tuple(shaped((plan.tiles(number) * plan.tokens,), jnp.float32) for number in normed),
    )
    given = (x, *([held] if normed else []), weights, norms, *([counters] if several else []))

    def body(*refs: Any) -> None:
        left = iter(refs)
        x, held = next(left), next(left) if normed else None
        weights, norms = next(left), next(left)
        shared, out, total = next(left) if several else None, next(left), next(left) if normed else None
        passed, squares = next(left), dict(zip(normed, next(left), strict=True))
        _body(plan, Refs(x, held, weights, norms, shared, out, total, passed, squares), _named(plan, next(left)))

    kernel = hopper.kernel(body, _scratch(plan), out_type=made, grid={"worker": plan.workers}, registers=REGISTERS)
    out, *total = kernel(*given)[: 2 if normed else 1]
    return out, total[0] if normed else held


def _shapes(plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
    """The columns of inputs, and how many tiles of how many columns sums have."""
    links = range(len(plan.links))
    return list(dict.fromkeys(map(plan.columns, links))), list(dict.fromkeys((plan.most(link), plan.columns(link)) for link in links))


def _scratch(plan: Plan) -> tuple[Any, ...]:
    columns, sums = _shapes(plan)
    inputs = [hopper.swizzled((INPUTS // (each * BLOCK * 2), each, BLOCK), plan.dtype) for each in columns]
    tiles = [plgpu.SMEM((count, each, TILE), jnp.float32) for count, each in sums]
    slots = max(map(plan.slots, range(len(plan.links))))
    copies = max(fold.parts * (2 if link.gated else 1) for link, fold in zip(plan.links, plan.folds, strict=True))
    return (
        hopper.swizzled((plan.stages, TILE, BLOCK), plan.dtype),
        plgpu.RefUnion(*inputs, *tiles),
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
    return Scratch(
        ring, dict(zip(columns, both, strict=False)), dict(zip(sums, both[len(columns) :], strict=True)), *others
    )


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
    column, total = lax.div(used, mine) * BLOCK, begin + used
    slot = lax.rem(total, jnp.int32(plan.stages))
    pl.when(total >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    landed = scratch.full.at[lax.rem(total + plan.stages - plan.flying, jnp.int32(plan.stages))]
    pl.when(total >= plan.flying)(lambda: plgpu.barrier_wait(landed))
    target, full, halves = scratch.ring.at[slot], scratch.full.at[slot], 2 if link.gated else 1
    size = fold.rows // halves
    for part in range(fold.parts):
        for half in range(halves):
            block = weight.at[pl.ds(half * link.results + tile * size, size), pl.ds(part * fold.part + column, BLOCK)]
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
        block = given.at[:, pl.ds(part * fold.part + used * BLOCK, BLOCK)]
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
                plgpu.wgmma(accumulator, scratch.ring.at[slot], scratch.inputs[columns].at[here].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch.free.at[slot])
            plgpu.barrier_arrive(scratch.used.at[here])

        lax.fori_loop(0, fold.length, step, None)
        for index, accumulator in enumerate(accumulators):
            sums.at[index].transpose((1, 0))[...] = plgpu.layout_cast(accumulator[...], plgpu.Layout.WGMMA_TRANSPOSED)

    pl.run_scoped(accumulate, *[ACC((TILE, columns), jnp.float32)] * count)
    plgpu.commit_smem()
    lax.fori_loop(0, count, lambda index, _: _leave(plan, refs, scratch, number, index, sums.at[index]), None)
    plgpu.commit_smem()  # what was read there is written by copies next


def _leave(plan: Plan, refs: Refs, scratch: Scratch, number: int, index: Any, sums: Any) -> None:
    """A tile's results: written, with its norm's weight if one comes next."""
    link, fold, tile = plan.links[number], plan.folds[number], lax.axis_index("worker") + index * plan.workers
    halves = 2 if link.gated else 1
    size = fold.rows // halves
    grid, rows = Grid(plan.tokens, size), pl.ds(tile * size, size)
    found = [met(fold, grid, sums, half * size) for half in range(halves)]
    if link.normed:
        factors = grid.load(scratch.factors, (1, 0))
        found = [part * factors for part in found]
    value = _swiglu(plan, *found) if link.gated else found[0].astype(plan.dtype)
    if number + 1 == len(plan.links):
        grid.store(refs.out.at[:, rows], value)
        return
    if not plan.before_norm(number):
        grid.store(refs.passed[number].at[:, rows], value)
        return
    first = not any(plan.before_norm(earlier) for earlier in range(number))
    stream = grid.load((refs.held if first else refs.total).at[:, rows]).astype(jnp.float32) + value.astype(jnp.float32)
    stream = stream.astype(plan.dtype)
    grid.store(refs.total.at[:, rows], stream)
    wide, after = stream.astype(jnp.float32), plan.links[number + 1]
    norm = grid.load(refs.norms[sum(plan.before_norm(earlier) for earlier in range(number))].at[rows], (0, 1)).astype(jnp.float32)
    grid.store(refs.passed[number].at[:, rows], (wide * (norm + after.offset if after.offset else norm)).astype(plan.dtype))
    grid.store_sums(refs.squares[number].at[pl.ds(tile * plan.tokens, plan.tokens)], wide * wide)


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

    def store(self, ref: Any, values: Any) -> None:
        """Write a reference [tokens, rows]."""
        if hopper.interpreting():
            ref[...] = values.reshape(self.tokens, self.rows)
            return

        def store(_: Any, ref: Any, values: Any) -> None:
            from jaxlib.mlir.dialects import llvm

            for number, pointer in zip(numbers_of(values), self.pointers(ref, None), strict=True):
                llvm.store(number, pointer)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def store_sums(self, ref: Any, values: Any) -> None:
        """Write each token's sum over its rows, float32 [tokens]; not in the interpreter."""

        def store(_: Any, ref: Any, values: Any) -> None:
            from jax.experimental.mosaic.gpu import utils
            from jaxlib.mlir.dialects import arith, llvm

            lanes, numbers = min(self.rows, 32), numbers_of(values)
            if self.rows > 32:
                raise NotImplementedError("rows of a token lie in one warp")
            word = thread().type
            for place, number in enumerate(numbers):
                shift = 1
                while shift < lanes:
                    number = arith.addf(number, utils.shfl_bfly(number, shift))
                    shift *= 2
                token, row = self.place(place)
                with utils.when(arith.cmpi(arith.CmpIPredicate.eq, row, utils.c(0, word))):
                    llvm.store(number, utils.getelementptr(utils.memref_ptr(ref), [token], number.type))

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def place(self, index: int) -> tuple[Any, Any]:
        """Token and row of a thread's number."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith

        at = arith.addi(thread(), utils.c(index * THREADS, thread().type))
        return arith.divui(at, utils.c(self.rows, at.type)), arith.remui(at, utils.c(self.rows, at.type))

    def pointers(self, ref: Any, strides: tuple[int, int] | None) -> list[Any]:
        """Where a thread's numbers are."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        kind = ir.MemRefType(ref.type)
        steps = strides or tuple(kind.get_strides_and_offset()[0])
        found = []
        for index in range(self.tokens * self.rows // THREADS):
            token, row = self.place(index)
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

        counts = ir.MemRefType(squares.type).shape[0] // THREADS
        each = [llvm.load(kind, at(squares, arith.addi(mine, c(index * THREADS)))) for index in range(counts)]
        llvm.store(reduce(arith.addf, each), at(partial, mine))
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
