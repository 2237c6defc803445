import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.paged_attention import api
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.paged_attention.pool import QuantizedKV, code_dtype

CASE = Case("x", decode_rows=2, prefill_rows=1, prefill_tokens=6, page_size=4, pages_per_row=3, group=2, head_dim=8)


def test_the_package_exports_it():
    assert pallas_kernels.paged_attention is api.paged_attention
    assert pallas_kernels.PagedMetadata is api.PagedMetadata
    assert pallas_kernels.kv_layout is api.kv_layout


def test_metadata_is_a_pytree_that_may_hold_anything():
    metadata = CASE.make(0)["metadata"]
    assert len(jax.tree.leaves(metadata)) == 4
    shapes = jax.tree.map(lambda x: x.shape, metadata)
    assert shapes.page_tables == (3, 3)
    assert shapes.decode_rows == 2
    assert jax.tree.structure(metadata) != jax.tree.structure(dataclasses.replace(metadata, decode_rows=1))
    assert jax.tree.structure(metadata) != jax.tree.structure(dataclasses.replace(metadata, decode_tokens=2))
    assert (metadata.decode_size, dataclasses.replace(metadata, decode_tokens=3).decode_size) == (2, 6)
    assert [str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(metadata)] == [
        ".page_tables",
        ".query_starts",
        ".query_lengths",
        ".kv_lengths",
    ]


def test_layout():
    layout = api.kv_layout("xla", kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    assert layout.shape(pages=10, page_size=16) == (10, 2, 2, 16, 64)
    assert layout.dtype == jnp.bfloat16
    assert layout.axes() == ("pages", "kv_heads", None, None, None)
    quantized = api.kv_layout("xla", kv_heads=2, head_dim=64, dtype=jnp.bfloat16, kv_dtype="int8")
    shapes = jax.tree.map(lambda array: (array.shape(pages=10, page_size=16), array.dtype.name, array.axes()[1]), quantized)
    assert shapes == QuantizedKV(((10, 2, 2, 16, 64), "int8", "kv_heads"), ((10, 2, 2, 16), "float32", "kv_heads"))
    with pytest.raises(ValueError, match="kv_dtype is 'int4'; it must be None or one of int8, float8_e4m3fn"):
        api.kv_layout("xla", kv_heads=2, head_dim=64, dtype=jnp.bfloat16, kv_dtype="int4")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        api.kv_layout("cuda", kv_heads=2, head_dim=64, dtype=jnp.bfloat16)


def checked(**changes):
    inputs = CASE.make(0) | changes
    order = [inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")]
    codes = code_dtype(inputs["kv"])
    layout = api.kv_layout("xla", kv_heads=2, head_dim=8, dtype=jnp.float32, kv_dtype=codes)
    api.check(*order, extras=(inputs.get("rope"), inputs.get("sinks")), layout=layout)


def other(**changes):
    return dataclasses.replace(CASE.make(0)["metadata"], **changes)


def test_good_arguments_pass():
    checked()
    checked(rope=None)
    checked(sinks=jnp.zeros(4, jnp.float32))
    checked(kv=QuantizedKV(jnp.zeros((10, 2, 2, 4, 8), jnp.int8), jnp.zeros((10, 2, 2, 4))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((8, 4), jnp.float32)}, r"q is float32\[8, 4\]; it must have shape \[tokens, heads, head_dim\]"),
        ({"k": jnp.zeros((7, 2, 8), jnp.float32)}, r"k is float32\[7, 2, 8\]; it must have shape \[8, 2, 8\]"),
        ({"v": jnp.zeros((8, 1, 8), jnp.float32)}, r"v is float32\[8, 1, 8\]; it must have shape \[8, 2, 8\] \(that of k\)"),
        ({"q": jnp.zeros((8, 3, 8), jnp.float32)}, "3 query heads over 2 kv heads"),
        ({"q": jnp.zeros((8, 4, 8), jnp.int32)}, "q is int32.*must be of a floating dtype"),
        ({"v": jnp.zeros((8, 2, 8), jnp.bfloat16)}, "v is bfloat16.*it must be float32.*cast it"),
        ({"positions": jnp.zeros(9, jnp.int32)}, r"positions is int32\[9\]"),
        ({"positions": jnp.zeros(8, jnp.float32)}, "positions is float32.*it must be int32"),
        ({"kv": jnp.zeros((10, 2, 2, 4, 8), jnp.bfloat16)}, r"kv is bfloat16.*kv_layout.*float32 with dimensions pages, kv_heads"),
        ({"kv": jnp.zeros((10, 2, 2, 4, 16), jnp.float32)}, r"kv is float32\[10, 2, 2, 4, 16\]; make it as kv_layout"),
        ({"kv": jnp.zeros((10, 2, 8), jnp.float32)}, r"kv is float32\[10, 2, 8\]; make it as kv_layout"),
        ({"kv": QuantizedKV(jnp.zeros((10, 2, 2, 4, 8), jnp.int8), jnp.zeros((9, 2, 2, 4)))}, r"kv.scales is float32\[9, 2, 2, 4\]; make"),
        ({"kv": QuantizedKV(jnp.zeros((9, 2, 2, 4, 9), jnp.int8), jnp.zeros((9, 2, 2, 4)))}, r"kv.values is int8\[9, 2, 2, 4, 9\]; make"),
        ({"rope": jnp.zeros(5, jnp.float32)}, r"rope is float32\[5\]; it must hold at most head_dim / 2 = 4"),
        ({"rope": jnp.zeros(4, jnp.bfloat16)}, "rope is bfloat16.*float32"),
        ({"sinks": jnp.zeros(3, jnp.float32)}, r"sinks is float32\[3\]; it must have shape \[4\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^paged_attention: .*{message}"):
        checked(**changes)


def test_metadata_that_does_not_fit_is_refused():
    rows = np.zeros(3, np.int32)
    for changes, message in [
        ({"decode_rows": 4}, "decode_rows=4 with 3 rows and 8 tokens"),
        ({"decode_tokens": 5}, r"decode_rows=2 with 3 rows and 8 tokens \(decode_tokens=5\)"),
        ({"decode_tokens": 0}, r"decode_tokens=0"),
        ({"decode_rows": 3}, "5 tokens follow the 3 decode rows but no row is left"),
        ({"kv_lengths": jnp.asarray(rows[:2])}, r"kv_lengths is int32\[2\]; it must have shape \[3\]"),
    ]:
        metadata = CASE.make(0)["metadata"]
        leaves = {name: getattr(metadata, name) for name in api._LEAVES} | changes
        static = leaves.pop("decode_rows", 2), leaves.pop("decode_tokens", 1)
        with pytest.raises(ValueError, match=f"^paged_attention: .*{message}"):
            checked(metadata=api.PagedMetadata.tree_unflatten(static, tuple(leaves.values())))
