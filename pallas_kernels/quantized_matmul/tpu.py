"""The quantised matmul on TPU (Pallas Mosaic TPU): the weight streams through VMEM as it is stored and is converted on its way.

The inputs of a block of tokens stay in VMEM while tiles of the weight, whole rows of some output channels, come into one of two buffers.
Steps of inputs are converted and multiplied; a scale of a whole row multiplies the sums in the end, a scale of a group each step's. int8
inputs meet int8 weights as they are. Of packed weights the low halves meet the even inputs and the high ones the odd. Where several groups
share a vector the inputs are repeated, each time with the others' made zero: many tokens of those are refused. Zeros other than 8 are a
small product of their own. Compiled and simulated, not yet measured on a chip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels import dispatch, generations, tensorcore, tuning
from pallas_kernels.attention import precision
from pallas_kernels.quantized_matmul.formats import PACKED, ZERO, Format
from pallas_kernels.rounding import round_tokens
from pallas_kernels.tensorcore import LANES, Call, Copies, ceil_to

OP = "quantized_matmul"
ROWS = 32  # of a tile of 8 bits
MANY = 256  # tokens; of formats whose groups share vectors more are refused
X_BYTES, WEIGHT_BYTES = 12 << 20, 2 << 20  # VMEM for a block of inputs, and for a tile of the weight


class Sizes(NamedTuple):
    """Tokens of a block and output channels of a tile; stored inputs multiplied at a time."""

    tokens: int
    outputs: int
    step: int


class Plan(NamedTuple):
    """Static shape: `blocks` of `sizes.tokens`, `tiles` of `sizes.outputs`; `parts` groups share a step, each step has scales or none."""

    sizes: Sizes
    blocks: int
    tiles: int
    parts: int
    grouped: bool
    packed: bool
    integers: bool
    cores: int


class Arrays(NamedTuple):
    """In HBM: inputs (even ones, odd ones of packed weights), the scale of each token in all lanes, the weight, scales by group."""

    x: Any  # [halves, tokens, stored]
    per_token: Any  # [tokens, lanes], or None
    weight: Any  # [out, stored]
    scales: Any  # [groups, out]


class Scratch(NamedTuple):
    """VMEM: inputs of a block; two tiles and their scales; sums; two results; semaphores."""

    x: Any
    per_token: Any
    weight: Any
    scales: Any
    sums: Any
    out: Any
    x_done: Any
    weight_done: Any
    out_done: Any


class Kernel(NamedTuple):
    """What the parts of the kernel see."""

    plan: Plan
    copies: Copies
    arrays: Arrays
    out: Any
    scratch: Scratch


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes for a key that was never measured: as many tokens as VMEM holds the inputs of, tiles of about 2 MiB."""
    stored = _stored(key)
    wide = int(key["in"]) * (1 if key["activations"] == "int8" else jnp.dtype(str(key["dtype"])).itemsize)
    tokens = min(ceil_to(int(key["tokens"]), ROWS), max((X_BYTES // wide) // ROWS * ROWS, ROWS), 1024)
    outputs = tensorcore.tile_of(int(key["out"]), stored, WEIGHT_BYTES)
    step = next(size for size in (512, 384, 256, LANES) if stored % size == 0)
    return Sizes(tokens, outputs, step)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    outputs = [size for size in (base.outputs // 2, base.outputs * 2) if size and size % LANES == 0 and size <= int(key["out"])]
    steps = [size for size in (LANES, 256, 1024) if _stored(key) % size == 0 and size != base.step]
    return [sizes._asdict() for sizes in (base, *(base._replace(outputs=o) for o in outputs), *(base._replace(step=s) for s in steps))]


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = tensorcore.refusal(target, key)
    if reason is not None or "in" not in key:
        return reason
    stored, outputs, group = _stored(key), int(key["out"]), int(key["group"])
    if stored % LANES or outputs % ROWS:
        return f"its kernel needs stored inputs in multiples of {LANES} and outputs of {ROWS}, not {stored} and {outputs}"
    own = group // 2 if key["weight"] == "int4" else group
    if own and own % LANES and LANES % own:
        return f"its kernel needs groups that fill or share vectors of {LANES} stored inputs, not of {own}"
    if 0 < own < LANES and int(key["tokens"]) > MANY:
        times = LANES // own
        return f"its kernel multiplies groups of {group} for at most {MANY} tokens, {times} times what is needed; here are {key['tokens']}"
    return None


def _stored(key: dispatch.Key) -> int:
    return int(key["in"]) // (2 if key["weight"] == "int4" else 1)


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "outs ins"],
    *,
    zeros: UInt8[Array, "outs ins"] | None = None,
    activations: str = "float",
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    kind, tokens = Format.of(weight, scales, activations), x.shape[0]
    target, key = dispatch.target(), kind.key(x, weight)
    plan = _plan(Sizes(**tuning.sizes(OP, "tpu", target, key)), kind, weight, tokens, target)
    final = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    per_row = jnp.repeat(scales.astype(jnp.float32), kind.outputs, axis=0).T
    per_row = jnp.pad(per_row, ((0, 0), (0, plan.tiles * plan.sizes.outputs - weight.shape[0])))
    inputs, per_token = x, None
    if plan.integers:
        inputs, per_token = round_tokens(x)
    padded = plan.blocks * plan.sizes.tokens - tokens
    halves = jnp.stack([inputs[:, 0::2], inputs[:, 1::2]]) if plan.packed else inputs[None]
    halves = jnp.pad(halves, ((0, 0), (0, padded), (0, 0)))
    if per_token is not None:
        per_token = jnp.pad(jnp.broadcast_to(per_token, (tokens, LANES)), ((0, padded), (0, 0)))
    exact = zeros is not None
    found = _run(Arrays(halves, per_token, weight, per_row), jnp.dtype(jnp.float32) if exact else final, plan)[:tokens, : weight.shape[0]]
    return (found - _shifted(x, zeros, scales, kind, activations)).astype(final) if exact else found


def _plan(sizes: Sizes, kind: Format, weight: Shaped[Array, "out stored"], tokens: int, target: dispatch.Target) -> Plan:
    packed, (outputs, stored) = weight.dtype == PACKED, weight.shape
    group = kind.inputs // 2 if packed else kind.inputs
    step = sizes.step if not group else group if group % LANES == 0 else LANES
    parts = LANES // group if group and group < LANES else 1
    chip = tensorcore.generation(target.device) or generations.V5E
    block = min(sizes.tokens, ceil_to(tokens, ROWS))
    own = Sizes(block, sizes.outputs, step if stored % step == 0 else LANES)
    return Plan(own, -(-tokens // block), -(-outputs // own.outputs), parts, bool(group), packed, kind.activations == "int8", chip.cores)


def _shifted(
    x: Float[Array, "tokens in"], zeros: UInt8[Array, "outs ins"], scales: Float[Array, "outs ins"], kind: Format, activations: str
) -> Float[Array, "tokens out"]:
    """What zeros other than 8 take away: sums of each group's inputs times zero and scale."""
    wide = x.astype(jnp.float32)
    if activations == "int8":
        rounded = round_tokens(x)
        wide = rounded.values.astype(jnp.float32) * rounded.scales
    sums = wide.reshape(x.shape[0], scales.shape[1], -1).sum(axis=2)
    away = jnp.repeat((zeros.astype(jnp.float32) - ZERO) * scales.astype(jnp.float32), kind.outputs, axis=0)
    return jnp.matmul(sums, away.T, precision="highest")


def _run(arrays: Arrays, dtype: Any, plan: Plan) -> Float[Array, "padded_tokens out"]:
    given, tree = jax.tree.flatten(arrays)
    sizes, stored, vmem = plan.sizes, arrays.weight.shape[1], pltpu.VMEM
    scratch = Scratch(
        x=vmem((arrays.x.shape[0], sizes.tokens, stored), arrays.x.dtype),
        per_token=None if arrays.per_token is None else vmem((sizes.tokens, LANES), jnp.float32),
        weight=vmem((2, sizes.outputs, stored), arrays.weight.dtype),
        scales=vmem((2, arrays.scales.shape[0], sizes.outputs), jnp.float32),
        sums=vmem((sizes.tokens, sizes.outputs), jnp.int32 if plan.integers and not plan.grouped else jnp.float32),
        out=vmem((2, sizes.tokens, sizes.outputs), dtype),
        x_done=pltpu.SemaphoreType.DMA(()),
        weight_done=pltpu.SemaphoreType.DMA((2,)),
        out_done=pltpu.SemaphoreType.DMA((2,)),
    )
    leaves, made = jax.tree.flatten(scratch)

    def body(copies: Copies, _: Any, hbm: Any, __: Any, outputs: Any, own: Any) -> None:
        _core(Kernel(plan, copies, jax.tree.unflatten(tree, hbm), outputs[0], jax.tree.unflatten(made, own)))

    shape = (plan.blocks * sizes.tokens, plan.tiles * sizes.outputs)
    moved = arrays.x.nbytes + plan.blocks * (arrays.weight.nbytes + arrays.scales.nbytes) + shape[0] * shape[1] * dtype.itemsize
    cost = pl.CostEstimate(flops=2 * shape[1] * arrays.x.size * plan.parts, transcendentals=0, bytes_accessed=moved)
    out = jax.ShapeDtypeStruct(shape, dtype)
    return tensorcore.run(Call(OP, [out], leaves, {}, cost, plan.cores, 44 << 20), body, (jnp.zeros(1, jnp.int32),), given)[0]


def _core(kernel: Kernel) -> None:
    """All tiles of one core, block of tokens after block of tokens."""
    plan, core = kernel.plan, pl.program_id(0)
    begin, end = (lax.div((core + more) * plan.tiles, jnp.int32(plan.cores)) for more in range(2))
    count = end - begin
    total = count * plan.blocks

    def tile(number: Any) -> Any:
        return begin + lax.rem(number, jnp.maximum(count, 1))

    pl.when(total > 0)(lambda: _copy_weight(kernel, begin, 0, start=True))

    def step(number: Any, _: None) -> None:
        block, slot = lax.div(number, jnp.maximum(count, 1)), lax.rem(number, jnp.int32(2))

        @pl.when(lax.rem(number, jnp.maximum(count, 1)) == 0)
        def _inputs() -> None:
            _copy_inputs(kernel, block, start=True)
            _copy_inputs(kernel, block, start=False)

        pl.when(number + 1 < total)(lambda: _copy_weight(kernel, tile(number + 1), 1 - slot, start=True))
        _copy_weight(kernel, tile(number), slot, start=False)
        _multiply(kernel, slot)
        pl.when(number >= 2)(lambda: _copy_out(kernel, block, tile(number), slot, start=False))
        _settle(kernel, slot)
        _copy_out(kernel, block, tile(number), slot, start=True)

    lax.fori_loop(0, total, step, None)
    for slot in range(2):
        pl.when(total > slot)(lambda slot=slot: _copy_out(kernel, 0, begin, slot, start=False))


def _copy_inputs(kernel: Kernel, block: Any, *, start: bool) -> None:
    act, scratch, rows = kernel.copies.start if start else kernel.copies.wait, kernel.scratch, kernel.plan.sizes.tokens
    place = pl.ds(pl.multiple_of(block * rows, rows), rows)
    act(kernel.arrays.x.at[:, place, :], scratch.x, scratch.x_done)
    if kernel.arrays.per_token is not None:
        act(kernel.arrays.per_token.at[place, :], scratch.per_token, scratch.x_done)


def _copy_weight(kernel: Kernel, tile: Any, slot: Any, *, start: bool) -> None:
    act, scratch, outputs = kernel.copies.start if start else kernel.copies.wait, kernel.scratch, kernel.plan.sizes.outputs
    place = pl.ds(pl.multiple_of(tile * outputs, outputs), outputs)

    def rows(count: int) -> None:
        some = pl.ds(pl.multiple_of(tile * outputs, outputs), count)
        act(kernel.arrays.weight.at[some, :], scratch.weight.at[slot, :count], scratch.weight_done.at[slot])

    tensorcore.copy_tile(tile, outputs, kernel.arrays.weight.shape[0], rows)
    act(kernel.arrays.scales.at[:, place], scratch.scales.at[slot], scratch.weight_done.at[slot])


def _copy_out(kernel: Kernel, block: Any, tile: Any, slot: Any, *, start: bool) -> None:
    act, sizes = kernel.copies.start if start else kernel.copies.wait, kernel.plan.sizes
    rows, columns = (pl.ds(pl.multiple_of(x * size, size), size) for x, size in ((block, sizes.tokens), (tile, sizes.outputs)))
    act(kernel.scratch.out.at[slot], kernel.out.at[rows, columns], kernel.scratch.out_done.at[slot])


def _multiply(kernel: Kernel, slot: Any) -> None:
    """Sums of a tile, step after step."""
    plan, scratch = kernel.plan, kernel.scratch
    step, rows = plan.sizes.step, _rows(plan)
    scratch.sums[...] = jnp.zeros(scratch.sums.shape, scratch.sums.dtype)

    def add(number: Any, _: None) -> None:
        place = pl.ds(pl.multiple_of(number * step, step), step)
        values = _values(scratch.weight[slot, :, place], scratch.x.dtype)

        def some(block: Any, _: None) -> None:
            own = pl.ds(pl.multiple_of(block * rows, rows), rows)
            found = None
            for part in range(plan.parts):
                dots = [_dot(_part(scratch.x[half, own, place], part, plan), each) for half, each in enumerate(values)]
                sums = dots[0] if len(dots) == 1 else dots[0] + dots[1]
                if plan.grouped:
                    sums = sums.astype(jnp.float32) * scratch.scales[slot, pl.ds(number * plan.parts + part, 1), :]
                found = sums if found is None else found + sums
            scratch.sums[own, :] = scratch.sums[own, :] + found

        lax.fori_loop(0, plan.sizes.tokens // rows, some, None)

    lax.fori_loop(0, scratch.weight.shape[2] // step, add, None)


def _rows(plan: Plan) -> int:
    """Tokens multiplied at a time."""
    return next(size for size in (256, 128, 64, ROWS) if plan.sizes.tokens % size == 0)


def _part(x: Any, part: int, plan: Plan) -> Any:
    """The inputs of one of the groups that share a vector, 0 where the others lie."""
    if plan.parts == 1:
        return x
    size = LANES // plan.parts
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= part * size) & (lane < (part + 1) * size)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jnp.where(mine, x.astype(wide), jnp.zeros((), wide)).astype(x.dtype)


def _values(weight: Any, dtype: Any) -> list[Any]:
    """The numbers that some of the weight holds, in the inputs' dtype; low and high halves apart."""
    if weight.dtype != PACKED:
        return [weight if weight.dtype == dtype else weight.astype(dtype)]
    wide = weight.astype(jnp.int32)
    return [_whole(half - ZERO, dtype) for half in (wide & 15, (wide >> 4) & 15)]


def _whole(x: Any, dtype: Any) -> Any:
    return x.astype(jnp.float32).astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else x.astype(dtype)


def _dot(x: Any, weight: Any) -> Any:
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=wide)


def _settle(kernel: Kernel, slot: Any) -> None:
    """The sums with what scales are left to apply."""
    plan, scratch = kernel.plan, kernel.scratch
    found = scratch.sums[...].astype(jnp.float32)
    if scratch.per_token is not None:
        found = found * scratch.per_token[:, :1]
    if not plan.grouped:
        found = found * scratch.scales[slot]
    scratch.out[slot] = found.astype(scratch.out.dtype)
