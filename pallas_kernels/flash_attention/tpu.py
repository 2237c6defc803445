"""Flash attention on TPU (Pallas Mosaic TPU): keys and values of one kv head side by side, copied ahead block by block.

An item is a block of queries, for the heads of a group, of one kv head and batch entry. Its keys come in blocks into one of two buffers
while the other is in use, across items too; blocks that no query sees are left out and those that all see need no mask. Before, plain jnp
puts queries by head and keys and values side by side, so that one copy brings both. Compiled and simulated, not yet measured on a chip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, generations, tensorcore, tuning
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.flash_attention.api import SegmentIds, tuning_key
from pallas_kernels.tensorcore import LANES, Call, Copies, ceil_to
from pallas_kernels.tensorcore_softmax import (
    Softmax,
    Step,
    absorb,
    blocks,
    both_lanes,
    finish,
    lines_of_sinks,
    query_lanes,
    start,
    unblocks,
    visible,
)

OP = "flash_attention"


class Sizes(NamedTuple):
    """Queries of a block times heads of a group, at most; keys of a block, and of a step of the multiplication."""

    lines: int
    keys: int
    step: int


class Plan(NamedTuple):
    """Static shape: blocks of `tokens` queries as `lines` rows, `blocks` for each of `entries` x `kv_heads`; blocks of `keys` keys."""

    spec: AttentionSpec
    causal: bool
    head_dim: int
    group: int
    tokens: int
    lines: int
    blocks: int
    kv_heads: int
    entries: int
    keys: int
    step: int
    cores: int


class Scratch(NamedTuple):
    """VMEM: two of everything that is copied, the running softmax; semaphores."""

    q: Any
    keys: Any
    out: Any
    ids: Any
    key_ids: Any
    softmax: Softmax
    q_done: Any
    keys_done: Any
    out_done: Any


class Arrays(NamedTuple):
    """In HBM; ids in all lanes of a line for queries, and along the lanes for keys."""

    q: Any  # [entries, blocks, kv_heads, lines, lanes]
    both: Any  # [entries, kv_heads, keys, lanes]
    ids: Any  # [entries, blocks, lines, lanes], or None
    key_ids: Any  # [entries, key_blocks, 1, keys], or None


class Kernel(NamedTuple):
    """What the parts of the kernel see; offsets and lengths of the batch entries are scalars."""

    plan: Plan
    copies: Copies
    offsets: Any
    lengths: Any
    arrays: Arrays
    sinks: Any
    out: Any
    scratch: Scratch


class Item(NamedTuple):
    """A block of queries: where it lies, which blocks of keys it sees, position of its first query, keys that exist."""

    entry: Any
    head: Any
    block: Any
    first: Any
    count: Any
    position: Any
    length: Any


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes for a key that was never measured."""
    wide = query_lanes(int(key["head_dim"])) * jnp.dtype(str(key["dtype"])).itemsize > 512
    return Sizes(512 if wide else 1024, 1024, 256)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    grid = [base._replace(lines=lines) for lines in (base.lines // 2, base.lines * 2)]
    grid += [base._replace(keys=512), base._replace(keys=2048), base._replace(step=512), base._replace(step=128)]
    return [sizes._asdict() for sizes in (base, *grid)]


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    return tensorcore.refusal(target, key)


def flash_attention(  # noqa: PLR0913
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    spec: AttentionSpec,
    causal: str,
    kv_lengths: Int32[Array, "batch"] | None = None,
    query_offsets: Int32[Array, "batch"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """See api.flash_attention."""
    batch, keys, kv_heads, head_dim = k.shape
    plan = _plan(q, k, spec, causal)
    padded = ceil_to(keys, plan.keys)
    both = jnp.concatenate([k, v], axis=3).swapaxes(1, 2)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, padded - keys), (0, both_lanes(head_dim) - 2 * head_dim)))
    queries = jax.vmap(lambda q: blocks(q, tokens=plan.tokens, kv_heads=kv_heads, lines=plan.lines))(q)
    ids, key_ids = (None, None) if segment_ids is None else _ids(segment_ids, plan, padded)
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else kv_lengths
    offsets = jnp.zeros((batch,), jnp.int32) if query_offsets is None else query_offsets
    lines = None if sinks is None else lines_of_sinks(sinks, tokens=plan.tokens, kv_heads=kv_heads, lines=plan.lines)
    out = _attend(Arrays(queries, both, ids, key_ids), offsets, lengths, lines, plan)
    out = jax.vmap(lambda out: unblocks(out, tokens=plan.tokens, head_dim=head_dim, group=plan.group))(out)
    return out[:, : q.shape[1]]


def _plan(q: Float[Array, "batch queries heads head_dim"], k: Float[Array, "batch keys kv_heads head_dim"], spec: Any, causal: str) -> Plan:
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    target = dispatch.target()
    sizes = Sizes(**tuning.sizes(OP, "tpu", target, tuning_key(q, kv_heads)))
    group = heads // kv_heads
    most = max(1 << (max(sizes.lines // group, 16).bit_length() - 1), 16)
    tokens = min(most, ceil_to(queries, 16))
    step = min(sizes.step, ceil_to(keys, LANES))
    chip = tensorcore.generation(target.device) or generations.V5E
    return Plan(
        spec, causal == "causal", head_dim, group, tokens, ceil_to(tokens * group, 8), -(-queries // tokens), kv_heads, batch,
        min(ceil_to(sizes.keys, step), ceil_to(keys, step)), step, chip.cores,
    )  # fmt: skip


def _ids(segment_ids: SegmentIds, plan: Plan, padded: int) -> tuple[Int32[Array, "entries blocks lines lanes"], Int32[Array, "..."]]:
    entries, queries = segment_ids.queries.shape
    own = jnp.pad(segment_ids.queries, ((0, 0), (0, plan.blocks * plan.tokens - queries))).reshape(entries, plan.blocks, plan.tokens)
    own = jnp.pad(jnp.repeat(own, plan.group, axis=2), ((0, 0), (0, 0), (0, plan.lines - plan.tokens * plan.group)))
    keys = jnp.pad(segment_ids.keys, ((0, 0), (0, padded - segment_ids.keys.shape[1])))
    return jnp.broadcast_to(own[..., None], (*own.shape, LANES)), keys.reshape(entries, -1, 1, plan.keys)


def _attend(
    arrays: Arrays, offsets: Int32[Array, "entries"], lengths: Int32[Array, "entries"], sinks: Any, plan: Plan
) -> Float[Array, "entries blocks kv_heads lines lanes"]:
    given, tree = jax.tree.flatten(arrays)
    vmem, lanes, out = pltpu.VMEM, query_lanes(plan.head_dim), arrays.q.shape
    scratch = Scratch(
        q=vmem((2, plan.lines, lanes), arrays.q.dtype),
        keys=vmem((2, 1, plan.keys, arrays.both.shape[3]), arrays.both.dtype),
        out=vmem((2, plan.lines, lanes), arrays.q.dtype),
        ids=None if arrays.ids is None else vmem((2, plan.lines, LANES), jnp.int32),
        key_ids=None if arrays.ids is None else vmem((2, 1, plan.keys), jnp.int32),
        softmax=Softmax.scratch(1, plan.lines, lanes),
        q_done=pltpu.SemaphoreType.DMA((2,)),
        keys_done=pltpu.SemaphoreType.DMA((2,)),
        out_done=pltpu.SemaphoreType.DMA((2,)),
    )
    leaves, made = jax.tree.flatten(scratch)

    def body(copies: Copies, scalars: Any, hbm: Any, constants: Any, outputs: Any, own: Any) -> None:
        inside = jax.tree.unflatten(tree, hbm)
        sinks = constants[0] if constants else None
        _core(Kernel(plan, copies, scalars[0], scalars[1], inside, sinks, outputs[0], jax.tree.unflatten(made, own)))

    pairs = plan.entries * plan.kv_heads * plan.blocks * plan.lines * arrays.both.shape[2] // (2 if plan.causal else 1)
    moved = 2 * arrays.q.size * arrays.q.dtype.itemsize + plan.blocks * arrays.both.size * arrays.both.dtype.itemsize
    cost = pl.CostEstimate(flops=4 * pairs * plan.head_dim, transcendentals=pairs, bytes_accessed=moved)
    call = Call(OP, [jax.ShapeDtypeStruct(out, arrays.q.dtype)], leaves, {}, cost, plan.cores, 40 << 20)
    return tensorcore.run(call, body, (offsets, lengths), given, () if sinks is None else (sinks,))[0]


def _item(kernel: Kernel, number: Any) -> Item:
    """Blocks of a head stand together, later ones last."""
    plan = kernel.plan
    block, rest = lax.rem(number, jnp.int32(plan.blocks)), lax.div(number, jnp.int32(plan.blocks))
    head, entry = lax.rem(rest, jnp.int32(plan.kv_heads)), lax.div(rest, jnp.int32(plan.kv_heads))
    length, position = kernel.lengths[entry], kernel.offsets[entry] + block * plan.tokens
    stop = jnp.minimum(length, position + plan.tokens) if plan.causal else length
    floor = jnp.int32(0) if plan.spec.window is None else jnp.maximum(position - (plan.spec.window - 1), 0)
    first = lax.div(jnp.minimum(floor, jnp.maximum(stop - 1, 0)), jnp.int32(plan.keys))
    count = jnp.maximum(lax.div(stop + (plan.keys - 1), jnp.int32(plan.keys)) - first, 1)
    return Item(entry, head, block, first, count, position, length)


def _core(kernel: Kernel) -> None:
    """All items of one core."""
    plan = kernel.plan
    total = plan.entries * plan.kv_heads * plan.blocks
    core = pl.program_id(0)
    begin, end = (lax.div((core + more) * total, jnp.int32(plan.cores)) for more in range(2))

    @pl.when(begin < end)
    def _first() -> None:
        item = _item(kernel, begin)
        _copy_queries(kernel, item, 0, start=True)
        _copy_keys(kernel, item, 0, 0, start=True)

    lax.fori_loop(begin, end, lambda number, slot: _attend_item(kernel, number, (begin, end), slot), jnp.int32(0))
    for half in range(2):
        pl.when(end - begin > half)(lambda half=half: _copy_out(kernel, _item(kernel, begin), half, start=False))


def _attend_item(kernel: Kernel, number: Any, bounds: Any, slot: Any) -> Any:
    """One item's blocks of keys, beginning in buffer `slot`; returns the buffer that the next item begins in."""
    (begin, end), scratch, item = bounds, kernel.scratch, _item(kernel, number)
    half, following = lax.rem(number - begin, jnp.int32(2)), _item(kernel, jnp.minimum(number + 1, end - 1))
    _copy_queries(kernel, item, half, start=False)
    pl.when(number + 1 < end)(lambda: _copy_queries(kernel, following, 1 - half, start=True))
    start(scratch.softmax, 0, kernel.sinks, column=item.head)

    def step(block: Any, slot: Any) -> Any:
        more = block + 1 < item.count
        pl.when(more)(lambda: _copy_keys(kernel, item, block + 1, 1 - slot, start=True))
        pl.when(jnp.logical_not(more) & (number + 1 < end))(lambda: _copy_keys(kernel, following, 0, 1 - slot, start=True))
        _copy_keys(kernel, item, block, slot, start=False)
        _attend_block(kernel, item, block, slot, half)
        return 1 - slot

    slot = lax.fori_loop(0, item.count, step, slot)
    pl.when(number - begin >= 2)(lambda: _copy_out(kernel, item, half, start=False))
    scratch.out[half] = finish(scratch.softmax, 0, scratch.out.dtype)
    _copy_out(kernel, item, half, start=True)
    return slot


def _copy_queries(kernel: Kernel, item: Item, half: Any, *, start: bool) -> None:
    act, semaphore = kernel.copies.start if start else kernel.copies.wait, kernel.scratch.q_done.at[half]
    act(kernel.arrays.q.at[item.entry, item.block, item.head], kernel.scratch.q.at[half], semaphore)
    if kernel.arrays.ids is not None:
        act(kernel.arrays.ids.at[item.entry, item.block], kernel.scratch.ids.at[half], semaphore)


def _copy_out(kernel: Kernel, item: Item, half: Any, *, start: bool) -> None:
    act = kernel.copies.start if start else kernel.copies.wait
    act(kernel.scratch.out.at[half], kernel.out.at[item.entry, item.block, item.head], kernel.scratch.out_done.at[half])


def _copy_keys(kernel: Kernel, item: Item, block: Any, slot: Any, *, start: bool) -> None:
    plan, act, semaphore = kernel.plan, kernel.copies.start if start else kernel.copies.wait, kernel.scratch.keys_done.at[slot]
    place = pl.ds(pl.multiple_of((item.first + block) * plan.keys, plan.keys), plan.keys)
    act(kernel.arrays.both.at[item.entry, item.head, place, :], kernel.scratch.keys.at[slot, 0], semaphore)
    if kernel.arrays.key_ids is not None:
        act(kernel.arrays.key_ids.at[item.entry, item.first + block], kernel.scratch.key_ids.at[slot], semaphore)


def _attend_block(kernel: Kernel, item: Item, block: Any, slot: Any, half: Any) -> None:
    """The keys in a buffer, `step` at a time: those that somebody sees."""
    plan, window = kernel.plan, kernel.plan.spec.window
    first = (item.first + block) * plan.keys
    stop = jnp.minimum(item.length, item.position + plan.tokens) if plan.causal else item.length
    steps = lax.div(jnp.clip(stop - first, 0, plan.keys) + (plan.step - 1), jnp.int32(plan.step))

    def step(number: Any, _: None) -> None:
        begin = first + number * plan.step
        free = begin + plan.step <= item.length
        if plan.causal:
            free &= begin + plan.step - 1 <= item.position
        if window is not None:
            free &= begin > item.position + (plan.tokens - 1 - window)
        if kernel.scratch.ids is not None:
            _multiply(kernel, item, (number, begin), (slot, half), masked=True)
            return
        pl.when(free)(lambda: _multiply(kernel, item, (number, begin), (slot, half), masked=False))
        pl.when(~free)(lambda: _multiply(kernel, item, (number, begin), (slot, half), masked=True))

    lax.fori_loop(0, steps, step, None)


def _multiply(kernel: Kernel, item: Item, step: Any, buffers: Any, *, masked: bool) -> None:
    """One step's keys enter the online softmax; what does not exist is made zero, since 0 times NaN is NaN."""
    plan, scratch, (number, begin), (slot, half) = kernel.plan, kernel.scratch, step, buffers
    place, seen = pl.ds(pl.multiple_of(number * plan.step, plan.step), plan.step), None
    both = scratch.keys[slot, :, place, :]
    if masked:
        row = lax.broadcasted_iota(jnp.int32, both.shape, 1) + begin
        both = jnp.where(row < item.length, both.astype(jnp.float32), 0.0).astype(both.dtype)
        key = lax.broadcasted_iota(jnp.int32, (1, 1, plan.step), 2) + begin
        seen = jnp.broadcast_to(key < item.length, (1, plan.lines, plan.step))
        if plan.causal:
            seen &= visible(plan.lines, key, position=item.position, group=plan.group, window=plan.spec.window)
        if scratch.ids is not None:
            seen &= scratch.ids[half][None, :, :1] == scratch.key_ids[slot, :, place][None]
    absorb(scratch.softmax, pl.ds(0, 1), Step(scratch.q[half][None], both), seen, spec=plan.spec, head_dim=plan.head_dim)
