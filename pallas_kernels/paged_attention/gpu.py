"""Paged attention on Hopper GPUs: the XLA implementation's pool, kernels of our own (Pallas Mosaic GPU).

A kernel puts the new keys and values into the donated pool and lays the queries out as the others read them (`gpu_write`; XLA does it
where that was measured to be faster, `gpu_lines`). Decode rows are cut into chunks of keys, which `gpu_decode` attends to and
`gpu_combine` merges; the tokens of the other rows are cut into tiles for `gpu_prefill`. The lists of work are made here, in plain jnp,
from the metadata alone: all layers of a program ask for the same ones and XLA computes them once. How a row is cut depends on its
own length and on static shapes, so a row's result depends on the row alone, bit for bit. Knows no model and no mesh.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, hopper, hopper_counters, hopper_tiles, tuning
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.paged_attention import gpu_decode, gpu_lines, gpu_plan, gpu_prefill, gpu_spread, gpu_write, packing, xla
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult
from pallas_kernels.paged_attention.gpu_combine import Merge, combine
from pallas_kernels.paged_attention.gpu_pages import Pages
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, values_of

MAX_GROUP = 16
MAX_TOKENS = 8  # of a decode row
MAX_CODES_DIM = 128  # head_dim of 8-bit keys and values: a converter takes registers
LEAST_CODES_PAGE = 32  # tokens whose scales fill the 128 bytes at which a copy into shared memory may begin
MAX_CHUNKS = 64  # of a row: longer rows get longer chunks
COPY_FROM = 16  # tokens of a step; where heads cannot be dealt out, fewer are rotated, written and laid out by XLA in fewer microseconds

kv_layout = xla.kv_layout


class Sizes(NamedTuple):
    """Block sizes. Decode: most keys of a chunk when rows are few and when they are many, blocks of 64 keys in shared memory at once (per
    stream). Prefill: keys of a block, blocks in shared memory at once. write_from: fewest tokens of a step that `gpu_write` takes.
    decode_merges: 1: where there are counters, chunks are merged by who ends the last one of a row, and no kernel of its own."""

    decode_longest: int
    decode_longest_many: int
    decode_stages: int
    prefill_keys: int
    prefill_stages: int
    write_from: int = 1
    decode_merges: int = 1


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes for a key that was never measured: chunks long enough to pay for the merge, shared memory filled."""
    head_dim, kv_heads = int(key["head_dim"]), int(key.get("kv_heads", 1))
    stages, group = {64: 6, 96: 4}.get(head_dim, 3), int(key.get("heads", kv_heads)) // kv_heads
    write_from = 1 if gpu_spread.Heads(kv_heads, group, head_dim).blocks else COPY_FROM
    return Sizes(2048, 4096, stages, 64 if head_dim > 128 else 128, 2, write_from)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring: those that fit in shared memory."""
    base, head_dim, codes = Sizes(**heuristic(platform, key)), int(key["head_dim"]), "kv_dtype" in key
    grid = [base._replace(decode_longest=keys) for keys in (1024, 4096)]
    grid += [base._replace(decode_longest_many=keys) for keys in (2048, 8192)]
    grid += [base._replace(decode_stages=stages) for stages in (base.decode_stages - 1, base.decode_stages + 1)]
    grid += [base._replace(prefill_stages=base.prefill_stages + 1), base._replace(decode_merges=0)]
    grid += [base._replace(write_from=tokens) for tokens in (1, COPY_FROM, 1 << 20) if tokens != base.write_from]
    grid += [base._replace(prefill_keys=64, prefill_stages=stages) for stages in (3, 4) if base.prefill_keys != 64]
    return [sizes._asdict() for sizes in (base, *grid) if fits(sizes, head_dim, codes=codes)]


def fits(sizes: Sizes, head_dim: int, *, codes: bool = False) -> bool:
    """Whether the kernels' shared memory is there; codes: for a quantised pool."""
    decode = gpu_plan.shared_bytes(head_dim, sizes.decode_stages, codes=codes)
    prefill = hopper_tiles.shared_bytes(head_dim, sizes.prefill_keys, sizes.prefill_stages, codes=codes)
    return max(decode, prefill) <= hopper.SHARED_BYTES


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why these kernels cannot run on a target, or for what is known of a key (see `packing.tuning_key`); None when they can."""
    page_size, kv_heads = int(key.get("page_size", 64)), int(key.get("kv_heads", 1))
    group = int(key.get("heads", kv_heads)) // kv_heads
    reason = hopper.refusal(target, key)
    if reason is not None:
        return reason
    if page_size < 8 or page_size & (page_size - 1):
        return f"its kernels need pages of 8, 16, 32, 64, 128, ... tokens, not of {page_size}"
    if group > MAX_GROUP:
        return f"its kernels have room for {MAX_GROUP} query heads per kv head, not for {group}"
    if int(key.get("decode_tokens", 1)) > MAX_TOKENS:
        return f"its kernels take up to {MAX_TOKENS} tokens of a decode row, not {key['decode_tokens']}; make longer rows prefill rows"
    return _refused_codes(key) if "kv_dtype" in key else None


def _refused_codes(key: dispatch.Key) -> str | None:
    if int(key.get("head_dim", 64)) > MAX_CODES_DIM:
        return f"its kernels read {key['kv_dtype']} keys and values of head_dim up to {MAX_CODES_DIM} (registers), not {key['head_dim']}"
    if int(key.get("page_size", LEAST_CODES_PAGE)) < LEAST_CODES_PAGE:
        return f"its kernels read {key['kv_dtype']} keys and values in pages of {LEAST_CODES_PAGE} tokens and more, not {key['page_size']}"
    if key.get("dtype", "bfloat16") != "bfloat16":
        return f"its kernels read {key['kv_dtype']} keys and values for bfloat16 activations only, not for {key['dtype']}"
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
    sizes = Sizes(**tuning.sizes("paged_attention", "gpu", dispatch.target(), packing.tuning_key(kv, q)))
    decode, group = metadata.decode_size, q.shape[1] // k.shape[1]
    work = gpu_lines.layout(positions, metadata, group)
    way = gpu_write if len(positions) >= sizes.write_from else gpu_lines
    placed = way.place(q, k, v, positions, kv, metadata, lines=work, spec=spec, rope=rope)
    parts = []
    if decode:
        parts.append(_decode(placed, positions[:decode], metadata, spec=spec, sinks=sinks, sizes=sizes, row=work.row))
    if work.tiles is not None:
        out = _prefill(placed, work.tiles, metadata, spec=spec, sinks=sinks, sizes=sizes, group=group)
        parts.append(way.collect(out, work.line, first=decode, group=group))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return PagedResult(out.reshape(q.shape), placed.kv)


def _tables(tables: Int32[Array, "rows pages_per_row"], kv: Pool, keys: int) -> tuple[Int32[Array, "rows width"], Pages]:
    """Page tables wide enough for whole blocks of keys (the guard page fills them up), and what there is to know of them."""
    _, kv_heads, _, page_size, _ = values_of(kv).shape
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % max(keys // page_size, 1))))
    return tables, Pages(kv_heads, page_size, tables.shape[1])


class Items(NamedTuple):
    """Work of a decode: for each item the integers gpu_plan.ITEM names, how many are real, and how many each row has."""

    fields: Int32[Array, "items 6"]
    total: Int32[Array, "1"]
    counts: Int32[Array, "rows"]


def cut_rows(
    stop: Int32[Array, "rows"], sees: Int32[Array, "rows"], *, window: int | None, wanted: int, longest: int, capacity: int, tokens: int = 1
) -> Items:
    """Rows of `stop` keys, at most `capacity`, of which their first token sees those before `sees`, cut into `wanted` chunks each, into
    fewer where they would be too short to pay, and into more where they would be longer than `longest` keys. tokens: of a row at most."""
    keys, rows = gpu_plan.KEYS, stop.shape[0]
    most = -(-capacity // keys) if window is None else min(-(-capacity // keys), -(-(window + tokens - 1) // keys) + 1)
    least, longest = (1 if wanted >= 16 else 2), max(longest // keys, -(-most // MAX_CHUNKS))
    max_chunks = min(max(wanted, -(-most // longest)), -(-most // least))
    first = jnp.zeros_like(stop) if window is None else lax.div(jnp.maximum(sees - window, 0), jnp.int32(keys))
    blocks = packing.ceil_div(stop, keys) - first
    chunks = jnp.maximum(wanted, packing.ceil_div(blocks, longest))
    size = jnp.maximum(lax.div(blocks + chunks - 1, chunks), least)
    counts = lax.div(blocks + size - 1, size)
    ends = jnp.cumsum(counts)
    item = jnp.arange(rows * max_chunks, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    number = item - packing.take(ends - counts, row)
    begin = number * packing.take(size, row)
    length = jnp.minimum(packing.take(blocks, row) - begin, packing.take(size, row))
    ends_of = (packing.take(stop, row), packing.take(sees, row))
    fields = jnp.stack([row, number, packing.take(first, row) + begin, length, *ends_of], axis=1)
    return Items(fields, ends[-1:], counts)


def _decode(
    placed: gpu_lines.Placed,
    positions: Int32[Array, "tokens"],
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "heads"] | None,
    sizes: Sizes,
    row: gpu_lines.RowLines,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """A few queries per row."""
    (kv_heads, _, head_dim), rows, kv = placed.q.shape, metadata.decode_rows, placed.kv
    tables, pages = _tables(metadata.page_tables[:rows], kv, gpu_plan.KEYS)
    stops, stop = packing.keys_seen(positions, metadata)
    streams, heads, capacity = gpu_plan.streams(head_dim), kv_heads * row.tiles, pages.width * pages.page_size
    wanted = min(max(streams * hopper.cores() // (rows * heads), 1), MAX_CHUNKS)  # all at work at once
    longest = sizes.decode_longest if wanted > 1 else sizes.decode_longest_many
    items = cut_rows(stop, stops[:, 0], window=spec.window, wanted=wanted, longest=longest, capacity=capacity, tokens=row.tokens)
    codes = kv.values.dtype if isinstance(kv, QuantizedKV) else None
    plan = gpu_plan.Plan(
        spec=spec,
        pages=pages,
        max_chunks=items.fields.shape[0] // rows,
        padded=row.padded,
        stages=gpu_plan.stages_that_fit(sizes.decode_stages, head_dim, row.padded, codes=codes is not None),
        streams=streams,
        blocks=hopper.cores(),
        group=row.group,
        tokens=row.per_tile,
        tiles=row.tiles,
        codes=codes,
    )
    scales = kv.scales.reshape(-1) if isinstance(kv, QuantizedKV) else None
    given = placed.q, values_of(kv).reshape(-1, head_dim), tables.reshape(-1), items.fields.reshape(-1), items.total
    counts = sizes.decode_merges and plan.max_chunks > 1 and sinks is None and rows * heads <= hopper_counters.PLACES
    if counts and metadata.counters is not None:
        plan = plan._replace(merge=Merge.of(kv_heads=heads, group=row.used, head_dim=head_dim, max_chunks=plan.max_chunks))
    decoded = gpu_decode.decode(*given, scales, rows=rows, plan=plan, counted=gpu_decode.Counted(items.counts, metadata.counters))
    if plan.max_chunks > 1 or sinks is not None:
        own = None if sinks is None else jnp.tile(sinks.reshape(kv_heads, -1), (1, row.tiles * row.per_tile)).reshape(-1)
        merged = decoded.merged
        if merged is None:
            merged = combine(decoded.parts, decoded.sums, items.counts, own, kv_heads=heads, group=row.used)
        out = merged.reshape(rows, heads, -1, head_dim)[:, :, : row.used]
    else:
        alone = decoded.parts.reshape(rows, heads, row.padded, head_dim)[:, :, : row.used]
        out = jnp.where((items.counts > 0)[:, None, None, None], alone, 0)
    return _of_tokens(out, positions, row, kv_heads)


def _of_tokens(
    out: Float[Array, "rows heads used head_dim"], positions: Int32[Array, "tokens"], row: gpu_lines.RowLines, kv_heads: int
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Each token's own lines."""
    rows, head_dim = out.shape[0], out.shape[-1]
    lines = out.reshape(rows, kv_heads, row.tiles * row.used, head_dim)[:, :, : row.tokens * row.group]
    out = packing.by_token(lines, (len(positions), kv_heads, row.group, head_dim))
    return out if row.tokens == 1 else jnp.where((positions >= 0)[:, None, None, None], out, 0)


def _prefill(
    placed: gpu_lines.Placed,
    blocks: packing.Blocks,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "heads"] | None,
    sizes: Sizes,
    group: int,
) -> Float[Array, "kv_heads lines head_dim"]:
    """Tiles of queries of one row each, in the order of the rows: tiles that run at the same time read the same keys."""
    kv_heads, lines, head_dim = placed.q.shape
    tables, pages = _tables(metadata.page_tables, placed.kv, sizes.prefill_keys)
    codes = placed.kv.values.dtype if isinstance(placed.kv, QuantizedKV) else None
    scales = [placed.kv.scales.reshape(-1)] if isinstance(placed.kv, QuantizedKV) else []
    places = blocks.row.shape[0]
    before = lines // hopper_tiles.LINES - places
    tokens = jnp.sum(blocks.position >= 0, axis=1, dtype=jnp.int32)
    stop = packing.take(metadata.kv_lengths, blocks.row)
    fields = jnp.stack([before + jnp.arange(places, dtype=jnp.int32), blocks.row, blocks.position[:, 0], tokens, stop], axis=1)
    inputs = hopper_tiles.Inputs(
        q=placed.q,
        kv=(values_of(placed.kv).reshape(-1, head_dim), tables.reshape(-1), *scales),
        tiles=fields.reshape(-1),
        total=blocks.total[None],
        sinks=None if sinks is None else _sinks_of_lines(sinks, kv_heads),
    )
    plan = hopper_tiles.Plan(
        spec=spec,
        queries=gpu_prefill.Queries(group),
        source=gpu_prefill.Keys(pages),
        heads=kv_heads,
        keys=sizes.prefill_keys,
        stages=sizes.prefill_stages,
        blocks=hopper.cores(),
        codes=codes,
        raw_stages=0 if codes is None else hopper_tiles.raw_stages(head_dim, sizes.prefill_keys, sizes.prefill_stages),
    )
    return hopper_tiles.attend(inputs, head_dim=head_dim, plan=plan)


def _sinks_of_lines(sinks: Float[Array, "heads"], kv_heads: int) -> Float[Array, "kv_heads lines"]:
    """The sink of each line of a warpgroup's queries: the group's heads over and over."""
    groups = sinks.reshape(kv_heads, -1)
    return jnp.tile(groups, (1, -(-hopper.TILE // groups.shape[1])))[:, : hopper.TILE]
