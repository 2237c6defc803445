"""A chain in one kernel on Hopper GPUs (Pallas Mosaic GPU): the memory never waits for a matmul to end.

Each multiprocessor has one block of threads from the first link to the last. A weight's rows are cut into tiles, which are dealt out by
their number. A producer copies blocks of this block's tiles into a ring of slots (TMA), those of the next links as well, since weights
depend on nothing; a consumer has the token as the left side of products (`hopper_token`). Every result of a link is an input of the next,
so each block waits for all results (`hopper_mail`), adds them to the residual stream and normalises it for itself. The first block writes
the stream.

All blocks must run at once: there are no more of them than multiprocessors (under CUDA's MPS, where processes share these, they may not). A
link on its own is the whole kernel without mail; so the interpreter, which knows none, runs the links one by one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch, hopper, hopper_counters, hopper_mail, tuning
from pallas_kernels.hopper import ACC, COLUMNS, TILE
from pallas_kernels.hopper_mail import Mail
from pallas_kernels.hopper_token import MOST_INPUTS, THREADS, LeftSide, Limbs, Piece, Same, pieces_of, places_of, together
from pallas_kernels.token_chain.api import key_of
from pallas_kernels.token_chain.reference import Form

ROWS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)  # of a tile: what one product of int8 can have
WIDTHS = (512, 256, 128)  # bytes of a row of a block
SLOTS, STAGES = (16384, 32768), 12  # bytes of a slot, and slots at most
REGISTERS = [232, 40]  # of a thread: of the consumer and of the producer


class Sizes(NamedTuple):
    """Bytes of a slot of the ring."""

    slot: int


class Link(NamedTuple):
    """Static shape of a link: a weight [outputs, inputs] in tiles of `rows` rows (of a gated one half from each half), read in blocks of
    `block` inputs; whether there is a norm before it."""

    inputs: int
    outputs: int
    rows: int
    block: int
    form: Form
    normed: bool

    @property
    def tiles(self) -> int:
        """Tiles of the weight."""
        return self.outputs // self.rows

    @property
    def length(self) -> int:
        """Blocks of a tile."""
        return self.inputs // self.block

    @property
    def results(self) -> int:
        """Numbers that the link passes on."""
        return self.outputs // (2 if self.form.gated else 1)


class Plan(NamedTuple):
    """Static shape of a chain: `workers` blocks of threads, each with `stages` slots of `slot` bytes; dtypes of token and weights."""

    links: tuple[Link, ...]
    workers: int
    stages: int
    slot: int
    dtype: Any
    stored: Any

    @property
    def left(self) -> LeftSide:
        """How the token meets the weights."""
        return Limbs() if self.stored == jnp.int8 else Same(self.dtype)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The widths in which the ring is read."""
        return tuple(dict.fromkeys(link.block for link in self.links))


class Scratch(NamedTuple):
    """Shared memory: the ring, once for each width of a block, the token, barriers of the slots; spilled: see `hopper.spill`."""

    ring: dict[int, Any]
    token: Any
    full: Any
    free: Any
    spilled: Any = None


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


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = hopper.refusal(target, {"dtype": key.get("dtype", "bfloat16")})
    if reason is not None:
        return reason
    if not (hopper.interpreting() or hopper.known_cores()):
        return "its blocks wait for each other, so there may be no more than run at once, and this device does not say how many do"
    passed = sum(int(key[f"in{number}"]) for number in range(1, int(key.get("links", 0))))
    if passed > hopper_mail.MOST:
        return f"its links pass {passed} numbers on, and there is room for {hopper_mail.MOST}"
    if key.get("weight", "int8") not in ("int8", key.get("dtype")):
        return "its kernel wants weights that are all int8 with scales, or all of the token's dtype"
    for number in range(int(key.get("links", 0))):
        inputs, outputs = int(key[f"in{number}"]), int(key[f"out{number}"])
        if inputs % THREADS or inputs > MOST_INPUTS or outputs % (2 * ROWS[0]):
            return f"its kernel needs inputs in multiples of {THREADS} up to {MOST_INPUTS} and outputs in multiples of {2 * ROWS[0]}"
    return None


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes that were never measured."""
    return Sizes(SLOTS[0])._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    return [Sizes(slot)._asdict() for slot in SLOTS]


def token_chain(
    x: Float[Array, "1 in"],
    held: Float[Array, "1 features"],
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_ 1"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain."""
    sizes = Sizes(**tuning.sizes("token_chain", "gpu", dispatch.target(), key_of(x, weights, scales)))
    value, total, links = x.reshape(-1), held.reshape(-1), tuple(zip(weights, scales, norms, forms, strict=True))
    for part in [(link,) for link in links] if hopper.interpreting() else [links]:
        some_weights, some_scales, some_norms, some_forms = zip(*part, strict=True)
        plan = plan_of(some_weights, some_norms, some_forms, x.dtype, sizes)
        flat = tuple(None if scale is None else scale.reshape(-1) for scale in some_scales)
        found = counters if counters is not None or len(plan.links) == 1 else hopper_counters.made()
        value, total = _chain(value, total, some_weights, flat, some_norms, found, plan=plan, interpreted=hopper.interpreting())
    return value[None], total[None]


def plan_of(weights: Sequence[Any], norms: Sequence[Any], forms: Sequence[Form], dtype: Any, sizes: Sizes) -> Plan:
    """How weights are dealt out: the rows of a tile are those with which the busiest worker has least to do."""
    cores, stored, links = hopper.cores(), weights[0].dtype, []
    for weight, norm, form in zip(weights, norms, forms, strict=True):
        outputs, inputs = weight.shape
        grain = 2 * ROWS[0] if form.gated else ROWS[0]
        fitting = [rows for rows in ROWS if outputs % rows == 0 and rows % grain == 0 and rows * WIDTHS[-1] <= sizes.slot]
        rows = min(fitting, key=lambda rows: -(-outputs // rows // cores) * (rows + 4))
        widths = [width // stored.itemsize for width in WIDTHS if rows * width <= sizes.slot]
        links.append(Link(inputs, outputs, rows, next(block for block in widths if inputs % block == 0), form, norm is not None))
    widest = max(link.inputs for link in links)
    held = widest * dtype.itemsize if stored == dtype else 3 * widest + 64
    held += TILE * max(link.block for link in links) * stored.itemsize if hopper.interpreting() else 0
    stages = min((hopper.SHARED_BYTES - 2048 - held) // sizes.slot, STAGES)
    return Plan(tuple(links), min(cores, max(link.tiles for link in links)), stages, sizes.slot, jnp.dtype(dtype), stored)


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _chain(
    x: Float[Array, "in"],
    held: Float[Array, "features"],
    weights: tuple[Shaped[Array, "_ _"], ...],
    scales: tuple[Float[Array, "_"] | None, ...],
    norms: tuple[Float[Array, "_"] | None, ...],
    counters: Any,
    *,
    plan: Plan,
    interpreted: bool,
) -> tuple[Array, Array]:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    given = (x, held, weights, tuple(s for s in scales if s is not None), tuple(n for n in norms if n is not None))
    normed = any(link.normed for link in plan.links)
    made = (jax.ShapeDtypeStruct((plan.links[-1].results,), plan.dtype), *([jax.ShapeDtypeStruct(held.shape, plan.dtype)] * normed))

    def body(x: Any, held: Any, weights: Any, scales: Any, norms: Any, *rest: Any) -> None:
        counters, *written, made = rest if len(plan.links) > 1 else (None, *rest)
        out, total = written if normed else (*written, None)
        ring, *others = made
        scratch = Scratch(dict(zip(plan.blocks, ring, strict=True)), *others)
        _body(plan, Refs(x, held, weights, scales, norms, counters, out, total), scratch)

    run = hopper.kernel(body, _scratch(plan), out_type=made, grid={"worker": plan.workers}, registers=REGISTERS)
    out, *total = run(*given, *([counters] if len(plan.links) > 1 else []))
    return out, total[0] if normed else held


def _scratch(plan: Plan) -> tuple[Any, ...]:
    size = plan.stored.itemsize
    rings = [hopper.swizzled((plan.stages, plan.slot // (block * size), block), plan.stored) for block in plan.blocks]
    return (
        plgpu.RefUnion(*rings) if len(rings) > 1 else tuple(rings),
        plan.left.room(max(link.inputs for link in plan.links)),
        plgpu.Barrier(num_barriers=plan.stages, num_arrivals=2),
        plgpu.Barrier(num_barriers=plan.stages),
        *((hopper.swizzled((TILE, plan.blocks[0]), plan.stored),) if hopper.interpreting() else ()),
    )


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    mine = [lax.div(link.tiles - worker + plan.workers - 1, jnp.int32(plan.workers)) for link in plan.links]
    begins, ahead = [], jnp.int32(0)
    for link, count in zip(plan.links, mine, strict=True):
        begins.append(ahead)
        ahead = ahead + count * link.length

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
        for number, link in enumerate(plan.links):
            produce = partial(_produce, plan, refs, scratch, number)
            lax.fori_loop(0, mine[number] * link.length, lambda used, _, run=produce, begin=begins[number]: run(begin, used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], ahead, plan.stages)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, number: int, begin: Any, used: Any) -> None:
    """Copy a block of a link's weight; `begin` counts the blocks of the links before, `used` those of this one."""
    link, weight = plan.links[number], refs.weights[number]
    tile = lax.axis_index("worker") + lax.div(used, jnp.int32(link.length)) * plan.workers
    columns = pl.ds(lax.rem(used, jnp.int32(link.length)) * link.block, link.block)
    slot = lax.rem(begin + used, jnp.int32(plan.stages))
    pl.when(begin + used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    target, full = scratch.ring[link.block].at[slot], scratch.full.at[slot]
    if not link.form.gated:
        plgpu.copy_gmem_to_smem(weight.at[pl.ds(tile * link.rows, link.rows), columns], target.at[pl.ds(0, link.rows)], full)
        plgpu.barrier_arrive(full)  # in place of the second half
        return
    half = link.rows // 2
    for part in range(2):
        rows = pl.ds(part * link.results + tile * half, half)
        plgpu.copy_gmem_to_smem(weight.at[rows, columns], target.at[pl.ds(part * half, half)], full)


def _enter(plan: Plan, refs: Refs, scratch: Scratch, number: int, mail: Mail | None) -> Any:
    """Make a link's inputs the left side of its products; the factor that its results are multiplied by."""
    link = plan.links[number]
    if not link.normed:
        return plan.left.put(_given(plan, refs, number, mail), scratch.token)
    stream = _stream(plan, refs, number, mail)
    weights = pieces_of(refs.norms[_norms_before(plan, number)])  # all that need not wait is loaded first
    pieces = _added(plan, stream, _given(plan, refs, number, mail))
    if not any(later.normed for later in plan.links[number + 1 :]):
        pl.when(lax.axis_index("worker") == 0)(partial(_write, refs.total, pieces))
    wide = [values.astype(jnp.float32) for _, values in pieces]
    squares = together(jnp.add, jnp.sum, [values * values for values in wide])
    root = lax.rsqrt(squares * (1.0 / link.inputs) + link.form.epsilon)
    normed = [
        Piece(place, _normed(plan, link.form, values * root, weight.astype(jnp.float32)))
        for values, (place, weight) in zip(wide, weights, strict=True)
    ]
    return plan.left.put(normed, scratch.token)


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


def _normed(plan: Plan, form: Form, scaled: Any, weight: Any) -> Any:
    """Rounded as the norm is on its own."""
    if form.offset:
        return (scaled * (weight + form.offset)).astype(plan.dtype)
    return (scaled.astype(plan.dtype).astype(jnp.float32) * weight).astype(plan.dtype)


def _consume(plan: Plan, refs: Refs, scratch: Scratch, number: int, mail: Any, factor: Any, begin: Any, index: Any) -> None:
    """The results of this worker's next tile of a link."""
    link, tile = plan.links[number], lax.axis_index("worker") + index * plan.workers
    size = link.rows // (2 if link.form.gated else 1)
    scales = [_scales(plan, refs, number, pl.ds(start + tile * size, size), factor) for start in range(0, link.outputs, link.results)]

    def accumulate(accumulator: Any) -> Any:
        first = begin + index * link.length
        lax.fori_loop(0, link.length, lambda place, _: _add_block(plan, link, accumulator, scratch, first, place), None)
        return accumulator[...]

    sums = plan.left.joined(pl.run_scoped(accumulate, ACC((TILE, link.rows), plan.left.sums)))
    parts = _halves(sums) if link.form.gated else [sums]
    found = [(part * scale).astype(plan.dtype).astype(jnp.float32) for part, scale in zip(parts, scales, strict=True)]
    result = found[0] / (1.0 + jnp.exp(-found[0])) * found[1] if link.form.gated else found[0]
    if number < len(plan.links) - 1:
        mail.post(_first(plan, number) + tile * size, result.astype(plan.dtype))
    else:
        hopper.store(refs.out.at[pl.ds(tile * size, size)], result.astype(plan.dtype))


def _scales(plan: Plan, refs: Refs, number: int, rows: Any, factor: Any) -> Any:
    if not refs.scales:
        return factor
    return hopper.load(refs.scales[number].at[rows], COLUMNS, coalesced=False).astype(jnp.float32) * factor


def _add_block(plan: Plan, link: Link, accumulator: Any, scratch: Scratch, first: Any, place: Any) -> None:
    slot = lax.rem(first + place, jnp.int32(plan.stages))
    token = plan.left.taken(scratch.token, place * link.block, link.block)
    plgpu.barrier_wait(scratch.full.at[slot])
    if scratch.spilled is not None:
        scratch.spilled[...] = token
        plgpu.commit_smem()
        token = scratch.spilled
    plgpu.wgmma(accumulator, token, scratch.ring[link.block].at[slot, pl.ds(0, link.rows)].transpose((1, 0)))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch.free.at[slot])


def _halves(values: Any) -> list[Any]:
    """Both halves of numbers [columns]; each thread has its own of them."""
    half = values.shape[0] // 2
    if hopper.interpreting():
        return [values[:half], values[half:]]
    made = plgpu.ShapeDtypeStruct((half,), jnp.float32, layout=COLUMNS)

    def split(_: Any, values: Any) -> tuple[Any, Any]:
        from jax.experimental.mosaic.gpu import fragmented_array as layouts

        first, second = np.split(values.registers, 2)
        array = partial(layouts.FragmentedArray, _layout=values.layout, _is_signed=None)
        return array(_registers=first), array(_registers=second)

    return list(plgpu.inline_mgpu(arg_types=(COLUMNS,), return_type=(made, made))(split)(values))
