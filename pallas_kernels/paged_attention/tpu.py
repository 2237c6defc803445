"""Paged attention on TPU: kernels of our own (Pallas Mosaic TPU) over a pool in which a token's key and value lie side by side.

Rope is applied in plain jnp. Decode rows go through one kernel that attends and writes (`tpu_attend`); prompts' new keys and values are
written by a small kernel (`tpu_write`) and then attended to by the same design in larger blocks. The pool is updated in place. How a row
is cut depends on static shapes and on where its tokens stand; a query's result does not depend on its neighbours. Compiled and simulated,
not yet measured on a chip. Knows no model and no mesh.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, generations, tensorcore, tuning
from pallas_kernels.attention import AttentionSpec, accumulation_dtype, rope_table, rotate
from pallas_kernels.paged_attention import tpu_attend, tpu_plan, tpu_write
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult
from pallas_kernels.paged_attention.packing import take, tuning_key
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, quantize, side_by_side, values_of
from pallas_kernels.tensorcore import LANES, ceil_to, sublanes
from pallas_kernels.tensorcore_softmax import blocks, both_lanes, lines_of_sinks, query_lanes, unblocks

OP = "paged_attention"
MAX_TOKENS = 8  # of a row that is written from inside the kernel that attends
QUERY_BYTES = 24 << 20  # VMEM for a block of queries of a prompt, its results and its softmax
TABLE_WORDS = 160 << 10  # page ids that one kernel gets: scalar memory is small

kv_layout = side_by_side


class Sizes(NamedTuple):
    """Keys of a block, and of a step of the multiplication; queries of a prefill block times heads that share a kv head, at most."""

    decode_keys: int
    decode_step: int
    prefill_keys: int
    prefill_step: int
    prefill_lines: int


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes for a key that was never measured: blocks of keys that hide a copy's latency, and VMEM of every generation enough for them."""
    lanes = both_lanes(int(key["head_dim"]))
    itemsize = 1 if "kv_dtype" in key else jnp.dtype(str(key["dtype"])).itemsize
    token = int(key["kv_heads"]) * lanes * itemsize
    keys = max(min((4 << 20) // token, 2048) // 256 * 256, 256)
    of_line = int(key["kv_heads"]) * (12 * query_lanes(int(key["head_dim"])) + 8 * LANES)  # queries and results twice, the softmax
    lines = min(1 << ((QUERY_BYTES // of_line).bit_length() - 1), 1024)
    return Sizes(keys, 256, max(min(keys, 1024), 256), 256, lines)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    grid = [base._replace(decode_keys=keys) for keys in (base.decode_keys // 2, base.decode_keys * 2) if keys >= 256]
    grid += [base._replace(decode_step=512), base._replace(prefill_step=512)]
    grid += [base._replace(prefill_lines=lines) for lines in (base.prefill_lines // 2, base.prefill_lines * 2)]
    return [sizes._asdict() for sizes in (base, *grid)]


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why these kernels cannot run on a target, or for what is known of a key (see `packing.tuning_key`); None when they can."""
    reason = tensorcore.refusal(target, key)
    if reason is not None:
        return reason
    page_size, dtype = int(key.get("page_size", 64)), str(key.get("kv_dtype", key.get("dtype", "bfloat16")))
    if page_size % sublanes(dtype) or page_size & (page_size - 1):
        return f"its kernels need pages of a power of two of tokens, at least {sublanes(dtype)} for {dtype}, not of {page_size}"
    return None


def paged_attention(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
    sinks: Float[Array, "heads"] | None,
) -> PagedResult:
    """See api.paged_attention."""
    tokens, heads, head_dim = q.shape
    few = metadata.decode_tokens <= MAX_TOKENS  # rows of more tokens go the way of prompts
    decode, size = (metadata.decode_rows, metadata.decode_size) if few else (0, 0)
    if rope is not None:
        table = rope_table(positions, rope.astype(accumulation_dtype(q.dtype)), spec.rope_scale)
        q, k = rotate(q, table), rotate(k, table)
    sizes = Sizes(**tuning.sizes(OP, "tpu", dispatch.target(), tuning_key(kv, q)))
    own, found = partial(_part, spec=spec, sinks=sinks, sizes=sizes), []
    rows = _rows(metadata, positions)
    for some in _deal(decode, metadata.page_tables.shape[1]):
        each, mine = jax.tree.map(lambda x, some=some: x[some], rows), _tokens(some, metadata.decode_tokens)
        each = each._replace(starts=each.starts - mine.start)
        out, kv = own(q[mine], k[mine], v[mine], kv, each, metadata.page_tables[some], tokens_of_row=metadata.decode_tokens)
        found.append(out)
    if tokens > size:
        each = jax.tree.map(lambda x: x[decode:], rows)
        each = each._replace(starts=each.starts - size)
        out, kv = own(q[size:], k[size:], v[size:], kv, each, metadata.page_tables[decode:], tokens_of_row=0)
        found.append(out)
    out = (found[0] if len(found) == 1 else jnp.concatenate(found)).reshape(tokens, heads, head_dim)
    return PagedResult(jnp.where((positions >= 0)[:, None, None], out, 0), kv)


def _deal(rows: int, width: int) -> list[slice]:
    """Decode rows in so many parts that the page tables of each fit in scalar memory."""
    most = max(TABLE_WORDS // width, 1)
    return [slice(begin, min(begin + most, rows)) for begin in range(0, rows, most)]


def _tokens(rows: slice, tokens_of_row: int) -> slice:
    return slice(rows.start * tokens_of_row, rows.stop * tokens_of_row)


def _rows(metadata: PagedMetadata, positions: Int32[Array, "tokens"]) -> tpu_plan.Rows:
    last = positions.shape[0] - 1
    first = jnp.maximum(take(positions, jnp.clip(metadata.query_starts, 0, last)), 0)
    return tpu_plan.Rows(metadata.query_starts, metadata.query_lengths, first, metadata.kv_lengths)


def _part(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    kv: Pool,
    rows: tpu_plan.Rows,
    tables: Int32[Array, "rows width"],
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "heads"] | None,
    sizes: Sizes,
    tokens_of_row: int,
) -> tuple[Float[Array, "tokens heads head_dim"], Pool]:
    """Decode rows of `tokens_of_row` tokens, or prompts (0)."""
    (tokens, _, head_dim), kv_heads, page_size = q.shape, k.shape[1], values_of(kv).shape[2]
    plan = plan_of(q, kv, tables.shape, spec=spec, sizes=sizes, tokens_of_row=tokens_of_row)
    items = tpu_plan.items(rows, tokens=tokens, block=plan.tokens, page_size=page_size, window=spec.window, cores=plan.cores)
    new = None
    if tokens_of_row:
        new = _new(k, v, kv).reshape(tables.shape[0], tokens_of_row, kv_heads, -1)
    else:
        work = tpu_write.pieces(rows, tables, tokens=tokens, page_size=page_size)
        kv = tpu_write.write(tpu_write.laid(k, v, kv, work.tokens), kv, work)
    lines = None if sinks is None else lines_of_sinks(sinks, tokens=plan.tokens, kv_heads=kv_heads, lines=plan.lines)
    queries = blocks(q, tokens=plan.tokens, kv_heads=kv_heads, lines=plan.lines)
    out, kv = tpu_attend.attend(tpu_attend.Arrays(queries, new), kv, items, tables, lines, plan)
    return unblocks(out, tokens=plan.tokens, head_dim=head_dim, group=plan.group)[:tokens], kv


def plan_of(q: Any, kv: Any, rows: tuple[int, ...], *, spec: AttentionSpec, sizes: Sizes, tokens_of_row: int) -> tpu_attend.Plan:
    """How a part is cut; q and kv: arrays or what describes them; rows: how many, and pages of each."""
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = values_of(kv).shape
    group, count = heads // kv_heads, rows[0]
    block = tokens_of_row
    keys, step = (sizes.decode_keys, sizes.decode_step) if block else (sizes.prefill_keys, sizes.prefill_step)
    if not block:
        typical = 1 << (-(-tokens // count) - 1).bit_length()
        most = 1 << (max(sizes.prefill_lines // group, 16).bit_length() - 1)
        block = max(min(most, typical), 16)
    lines = ceil_to(block * group, 8)
    step = max(step // page_size, 1)
    pages = ceil_to(min(max(keys // page_size, 1), rows[1]), step)
    at_once = next(count for count in (8, 4, 2, 1) if kv_heads % count == 0) if lines <= 64 else 1
    chip = tensorcore.generation(dispatch.target().device) or generations.V5E
    new = tokens_of_row
    return tpu_attend.Plan(spec, head_dim, block, group, lines, pages, step, at_once, rows[1], new, chip.cores, chip.vmem * 3 // 4)


def _new(
    k: Float[Array, "tokens kv_heads head_dim"], v: Float[Array, "tokens kv_heads head_dim"], kv: Pool
) -> Float[Array, "tokens kv_heads new_lanes"]:
    """Keys and values side by side in float32, whose numbers any pool's are among; a quantised pool's with its scales behind them."""
    both, lanes = jnp.stack([k, v], axis=2), values_of(kv).shape[3]
    scales = None
    if isinstance(kv, QuantizedKV):
        both, scales = quantize(both, kv.values.dtype)
    flat = both.astype(jnp.float32).reshape(*k.shape[:2], -1)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, lanes - flat.shape[2])))
    if scales is None:
        return flat
    return jnp.concatenate([flat, jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, 0), (0, LANES - 2)))], axis=2)
