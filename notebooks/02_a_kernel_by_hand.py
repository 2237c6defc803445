# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A paged attention kernel by hand
#
# Generating a token means reading every key and value of the text so far. This notebook climbs from the three lines that define attention
# to a paged, split decode kernel of the kind that runs on a GPU, one idea at a time. Each step is checked against jaxinfer's reference
# implementation, and everything runs on a CPU: Pallas kernels run there in interpret mode.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxinfer") is None:
    package = "jaxinfer[bench] @ git+https://github.com/{{REPOSITORY}}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, flash_attention
from pallas_kernels.attention import AttentionSpec

jax.config.update("jax_platforms", "cpu")


def error(found, wanted):
    """Largest difference, relative to the largest value."""
    return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))


# %% [markdown]
# ## 1. The definition
# Scores are dot products of queries with keys, weights their softmax, outputs the weighted means of the values. A query sees the keys up
# to its own position. The matrix of scores has `tokens x tokens` entries: at 16,384 tokens and 32 heads that is 17 GB in bfloat16.

# %%
HEADS, TOKENS, DIM = 2, 256, 64
SCALE = DIM**-0.5
q, k, v = jax.random.normal(jax.random.key(0), (3, HEADS, TOKENS, DIM))


def naive(q, k, v):
    scores = jnp.einsum("hqd,hkd->hqk", q, k) * SCALE
    scores = jnp.where(jnp.tril(jnp.ones((TOKENS, TOKENS), bool)), scores, -jnp.inf)
    return jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(scores, axis=-1), v)


tokens_first = [x.swapaxes(0, 1)[None] for x in (q, k, v)]  # the project's order: batch, tokens, heads, head_dim
wanted = flash_attention(*tokens_first, spec=AttentionSpec(SCALE), causal="causal", implementation="reference")[0].swapaxes(0, 1)
print("error:", error(naive(q, k, v), wanted))
assert error(naive(q, k, v), wanted) < 1e-5

# %% [markdown]
# ## 2. One block of keys at a time
# A softmax needs the sum over *all* keys, but the sum can be kept while it grows: remember the largest score so far (`top`), the sum of
# `exp(score - top)` (`total`) and the sum of values weighted alike (`weighted`). When a block brings a larger score, what was summed before
# shrinks by `exp(old top - new top)`. One division at the end. Only one block of scores exists at a time.

# %%
LOWEST = -1e30  # like minus infinity, but the difference of two of them is 0 and not NaN


def blank(queries):
    return jnp.full((queries, 1), LOWEST), jnp.zeros((queries, 1)), jnp.zeros((queries, DIM))


def absorb(state, scores, seen, values):
    """One block of keys enters: scores [queries, keys], what is seen of them, values [keys, dim]."""
    top, total, weighted = state
    new_top = jnp.maximum(top, jnp.max(jnp.where(seen, scores, LOWEST), axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - new_top), 0)
    decay = jnp.exp(top - new_top)
    return new_top, total * decay + jnp.sum(weights, axis=-1, keepdims=True), weighted * decay + weights @ values


BLOCK = 32
state, history = blank(1), []
for first in range(0, TOKENS, BLOCK):  # the last query of the first head: it sees everything
    keys = slice(first, first + BLOCK)
    state = absorb(state, q[0, -1:] @ k[0, keys].T * SCALE, True, v[0, keys])
    history.append([float(state[0][0, 0]), float(state[1][0, 0]), error(state[2] / state[1], wanted[0, -1:])])
assert history[-1][2] < 1e-5

figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), layout="constrained")
for axis, values, title in zip(axes, zip(*history, strict=True), ("top", "total", "error of weighted / total"), strict=True):
    axis.plot(range(1, len(values) + 1), values, "o-")
    axis.set(title=title, xlabel="blocks absorbed")
axes[2].set_yscale("log")
plt.show()

# %% [markdown]
# ## 3. The loop becomes a kernel
# A Pallas kernel is a function of references to memory. `grid` says how many instances run (here one per head and block of queries, on a
# GPU in parallel), a `BlockSpec` which part of an array an instance gets. Each instance keeps its state in registers and walks over the
# keys it can see; a block of queries near the beginning stops early, so half of the work is never done.

# %%


def flash_kernel(q_ref, k_ref, v_ref, out_ref):
    queries = q_ref[...] * SCALE
    first = pl.program_id(1) * BLOCK
    position = first + jnp.arange(BLOCK)[:, None]

    def step(block, state):
        keys = pl.ds(block * BLOCK, BLOCK)
        seen = block * BLOCK + jnp.arange(BLOCK)[None] <= position
        return absorb(state, queries @ k_ref[keys, :].T, seen, v_ref[keys, :])

    _, total, weighted = jax.lax.fori_loop(0, pl.program_id(1) + 1, step, blank(BLOCK))
    out_ref[...] = weighted / total


mine = pl.BlockSpec((None, BLOCK, DIM), lambda head, block: (head, block, 0))
every = pl.BlockSpec((None, TOKENS, DIM), lambda head, block: (head, 0, 0))
flash = pl.pallas_call(
    flash_kernel,
    grid=(HEADS, TOKENS // BLOCK),
    in_specs=[mine, every, every],
    out_specs=mine,
    out_shape=jax.ShapeDtypeStruct((HEADS, TOKENS, DIM), jnp.float32),
    interpret=True,
)
found = jax.jit(flash)(q, k, v)
print("error:", error(found, wanted))
assert error(found, wanted) < 1e-5

# %% [markdown]
# ## 4. Decode: the heads of a group are the rows of a matrix
# While text is generated each sequence has one new query, so the "matrix" of queries has one row and nothing is used twice. Grouped-query
# attention gives several query heads the same keys and values. Packed together they are rows again: K and V are read once for all of them.

# %%
KV_HEADS, GROUP = 2, 4
one = jax.random.normal(jax.random.key(1), (KV_HEADS, GROUP, DIM))  # query heads 0-3 belong to KV head 0


def decode_kernel(q_ref, k_ref, v_ref, out_ref):
    def step(block, state):
        keys = pl.ds(block * BLOCK, BLOCK)
        return absorb(state, q_ref[...] @ k_ref[keys, :].T * SCALE, True, v_ref[keys, :])

    _, total, weighted = jax.lax.fori_loop(0, TOKENS // BLOCK, step, blank(GROUP))
    out_ref[...] = weighted / total


group = pl.BlockSpec((None, GROUP, DIM), lambda head: (head, 0, 0))
whole = pl.BlockSpec((None, TOKENS, DIM), lambda head: (head, 0, 0))
decode = pl.pallas_call(
    decode_kernel,
    grid=(KV_HEADS,),
    in_specs=[group, whole, whole],
    out_specs=group,
    out_shape=jax.ShapeDtypeStruct(one.shape, jnp.float32),
    interpret=True,
)
query = one.reshape(1, 1, KV_HEADS * GROUP, DIM)
wanted = flash_attention(query, *tokens_first[1:], spec=AttentionSpec(SCALE), causal="full", implementation="reference")
found = jax.jit(decode)(one, k, v)
print("error:", error(found.reshape(query.shape), wanted))
print(f"bytes of K and V, packed: {2 * k.nbytes:,}; each query head for itself: {2 * k.nbytes * GROUP:,}")
assert error(found.reshape(query.shape), wanted) < 1e-5

# %% [markdown]
# ## 5. Pages
# Sequences grow and end at different times; room for the longest one each would waste most of the memory. So keys and values live in
# pages of a common pool, and each sequence has a table of its pages. The project's test cases make such a pool, and a hostile one: tables
# are shuffled, lengths ragged, some rows empty, and every slot that belongs to nobody holds NaN.

# %%
from pallas_kernels.paged_attention.cases import Case

ROWS, PAGE, WIDTH = 6, 16, 12  # sequences, tokens of a page, pages of a table
sizes = {"page_size": PAGE, "pages_per_row": WIDTH, "kv_heads": KV_HEADS, "group": GROUP, "head_dim": DIM}
case = Case("by hand", decode_rows=ROWS, **sizes, extras=frozenset())
inputs = case.make(seed=3)
wanted, pool = case.run(inputs, "reference")  # writes the new token's k and v into the pool, then attends
tables, lengths = inputs["metadata"].page_tables, inputs["metadata"].kv_lengths
queries = jnp.nan_to_num(inputs["q"]).reshape(ROWS, KV_HEADS, GROUP, DIM)
wanted = wanted.reshape(queries.shape)
print("pool:", dict(zip(case.layout("reference").dims, pool.shape, strict=True)))
print("lengths:", lengths, "\ntable of the longest:", tables[jnp.argmax(lengths)])

# %% [markdown]
# The kernel asks the table where the next page is. The last page is rarely full: scores beyond the length are masked, and so are
# values, because 0 times NaN is NaN.


# %%
def over_pages(row, head, pages, refs):
    """The softmax of one row and KV head over pages [first, stop) of its table."""
    tables_ref, lengths_ref, q_ref, kv_ref = refs
    first, stop = pages

    def step(index, state):
        page, length = tables_ref[row, index], lengths_ref[row]
        seen = index * PAGE + jnp.arange(PAGE) < length
        keys, values = kv_ref[page, head, 0], jnp.where(seen[:, None], kv_ref[page, head, 1], 0)
        return absorb(state, q_ref[...] @ keys.T * SCALE, seen[None], values)

    return jax.lax.fori_loop(first, jnp.minimum(stop, pl.cdiv(lengths_ref[row], PAGE)), step, blank(GROUP))


def paged_kernel(*refs):
    *refs, out_ref = refs
    _, total, weighted = over_pages(pl.program_id(0), pl.program_id(1), (0, WIDTH), refs)
    out_ref[...] = weighted / jnp.where(total > 0, total, 1)  # an empty row: 0


def everything(array):
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


own = pl.BlockSpec((None, None, GROUP, DIM), lambda row, head, *_: (row, head, 0, 0))
paged = pl.pallas_call(
    paged_kernel,
    grid=(ROWS, KV_HEADS),
    in_specs=[everything(tables), everything(lengths), own, everything(pool)],
    out_specs=own,
    out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
    interpret=True,
)
found = jax.jit(paged)(tables, lengths, queries, pool)
print("error:", error(found, wanted))
assert error(found, wanted) < 1e-5

# %% [markdown]
# ## 6. Many workers for one row
# One long sequence with 8 KV heads would keep 8 of an H200's 132 processors busy and leave the others idle, and the memory's bandwidth
# with them. So the keys of a row are cut into chunks, each worker makes the three running quantities of its own chunk, and a second,
# small kernel merges them, with the same rule by which blocks were absorbed (flash decoding).

# %%


def split_kernel(*refs, chunk):
    *refs, top_ref, total_ref, weighted_ref = refs
    first = pl.program_id(2) * chunk
    top_ref[...], total_ref[...], weighted_ref[...] = over_pages(pl.program_id(0), pl.program_id(1), (first, first + chunk), refs)


def merge_kernel(top_ref, total_ref, weighted_ref, out_ref):
    parts = range(top_ref.shape[0])
    top, total, weighted = top_ref[0], 0.0, 0.0
    for part in parts:
        top = jnp.maximum(top, top_ref[part])
    for part in parts:  # always in the same order
        share = jnp.exp(top_ref[part] - top)
        total, weighted = total + total_ref[part] * share, weighted + weighted_ref[part] * share
    out_ref[...] = weighted / jnp.where(total > 0, total, 1)


@partial(jax.jit, static_argnames="chunk")
def split_decode(tables, lengths, queries, pool, chunk):
    """Chunks of `chunk` pages, one worker each; then the merge."""
    rows, parts = len(tables), -(-WIDTH // chunk)
    shapes = [(rows, KV_HEADS, parts, GROUP, last) for last in (1, 1, DIM)]
    states = pl.pallas_call(
        partial(split_kernel, chunk=chunk),
        grid=(rows, KV_HEADS, parts),
        in_specs=[everything(tables), everything(lengths), own, everything(pool)],
        out_specs=[pl.BlockSpec((None, None, None, *shape[3:]), lambda *worker: (*worker, 0, 0)) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        interpret=True,
    )(tables, lengths, queries, pool)
    return pl.pallas_call(
        merge_kernel,
        grid=(rows, KV_HEADS),
        in_specs=[pl.BlockSpec((None, None, *shape[2:]), lambda row, head: (row, head, 0, 0, 0)) for shape in shapes],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        interpret=True,
    )(*states)


for chunk in (1, 3, WIDTH):
    found = split_decode(tables, lengths, queries, pool, chunk)
    print(f"chunks of {chunk:2} pages, error:", error(found, wanted))
    assert error(found, wanted) < 1e-5

# %% [markdown]
# ## 7. A row must not feel its neighbours
# How long should a chunk be? It is tempting to look at the batch: many rows keep the machine busy by themselves, few rows need more chunks.
# But floating-point sums depend on their order. Then the same request gets other bits when other requests run beside it, now and then
# another token, and nobody can reproduce it. If the cut depends on the row itself and on fixed sizes only, its bits stay the same.

# %%
row = int(jnp.argmax(lengths))
alone = (tables[row : row + 1], lengths[row : row + 1], queries[row : row + 1], pool)


def by_the_batch(tables, *rest):
    """Enough chunks for 12 workers per KV head, however many rows there are."""
    return split_decode(tables, *rest, chunk=max(1, WIDTH * len(tables) // 12))


fixed = np.array_equal(split_decode(*alone, chunk=3)[0], split_decode(tables, lengths, queries, pool, chunk=3)[row])
tempting = np.asarray(by_the_batch(*alone)[0] != by_the_batch(tables, lengths, queries, pool)[row])
print("chunks of 3 pages, alone and in the batch: the same bits?", fixed)
print(f"chunks by the batch: {tempting.sum()} of {tempting.size} values differ")
assert fixed and tempting.any()

# %% [markdown]
# ## 8. What it must cost
# Before a kernel is measured its floor is computed. An H200 read 4.5 TB/s and did 807 TFLOP/s of bfloat16 matmul when we measured it, 179
# operations in the time of one byte. Decode does `4 x head_dim` operations per query head and key, and reads `4 x head_dim` bytes per KV
# head and key: as many operations per byte as a group has heads. So decode waits for memory, always, and the floor is bytes over
# bandwidth.

# %%
BANDWIDTH, MATMUL, PROCESSORS = 4.5e12, 807e12, 132


def kv_bytes(rows, context, kv_heads=8, head_dim=128):
    """K and V in bfloat16."""
    return rows * context * kv_heads * head_dim * 2 * 2


print("rows x context      MB  floor in us")
for rows, context in ((1, 1024), (16, 1024), (64, 1024), (64, 4096), (256, 1024), (1, 131072)):
    size = kv_bytes(rows, context)
    print(f"{rows:4} x {context:6} {size / 1e6:9.1f} {size / BANDWIDTH * 1e6:12.1f}")

# %% [markdown]
# Left: the roof. Decode lies on the slope, prefill (where each key serves thousands of queries) under the flat part. Right: without
# splitting, a worker per row and KV head fills the processors badly unless there are many; with chunks of 256 keys there is always enough.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
intensity = np.logspace(-1, 4)
left.loglog(intensity, np.minimum(intensity * BANDWIDTH, MATMUL) / 1e12, "k")
for name, at in (("group 1", 1), ("group 4", 4), ("group 16", 16), ("prefill 2k", 820)):
    left.plot(at, min(at * BANDWIDTH, MATMUL) / 1e12, "o", label=name)
left.set(xlabel="operations per byte", ylabel="TFLOP/s at most", title="roof of an H200")
left.legend()

rows = np.arange(1, 65)
for chunks, label in ((1, "one worker a row and head"), (16, "16 chunks")):
    workers = rows * 8 * chunks
    right.plot(rows, workers / (np.ceil(workers / PROCESSORS) * PROCESSORS), label=label)
right.set(xlabel="rows of 4096 tokens", ylabel="share of processors busy", title="filling 132 processors", ylim=(0, 1.05))
right.legend()
plt.show()

# %% [markdown]
# Bandwidth also takes patience: a byte arrives about a microsecond after it was asked for, so 4.5 MB must be on their way at any time, 34
# kB per processor. A loop that asks for a page, waits and computes never gets there.
#
# ## 9. The kernel that runs
# `pallas_kernels/paged_attention/` holds the op: `api.py` says what it takes, `reference.py` what it means, `xla.py` runs everywhere, and
# the files named after a platform hold kernels written for it. The one for Hopper GPUs does what this notebook did, with these
# differences:
#
# - Pages come through the tensor memory accelerator (TMA): one instruction copies keys and values of a page to shared memory and signals
#   a barrier. Several copies are always on their way, and with them those 34 kB.
# - Warpgroups come in pairs: one only asks for pages, the other computes on those that have arrived.
# - Products run on the tensor cores (`wgmma`), in bfloat16 with float32 sums; exponentials are powers of 2.
# - Instances are persistent: as many as there are processors, each working through a list of chunks, so that long and short rows balance.
# - A chunk's output is divided by its own sum right away and leaves in bfloat16, with the logarithm of the sum for the merge.
# - How a row is cut depends on its own length and on sizes fixed when the program was compiled: the bits of step 7.
#
# Every implementation passes the same contract test, over the same hostile cases as here:

# %%
implementations = dispatch.implementations("paged_attention")
print("implementations:", *implementations)
result = case.run(inputs, "xla")
print("xla, error:", error(result.out.reshape(wanted.shape), wanted))
assert error(result.out.reshape(wanted.shape), wanted) < 1e-5

# %% [markdown]
# `python -m jaxinfer bench kernels --op paged_attention --cases bench` measures them on your machine, beside its ceilings.
