import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import AttentionSpec, SegmentIds
from pallas_kernels.flash_attention import api

GOOD = {
    "q": jnp.zeros((2, 3, 4, 8), jnp.float32),
    "k": jnp.zeros((2, 5, 2, 8), jnp.float32),
    "v": jnp.zeros((2, 5, 2, 8), jnp.float32),
    "causal": "causal",
    "spec": AttentionSpec(0.5),
}


def checked(**changes):
    arguments = GOOD | changes
    arrays = [arguments.pop(name) for name in ("q", "k", "v")]
    api.check(*arrays, **arguments)


def test_the_package_exports_it():
    assert pallas_kernels.flash_attention is api.flash_attention


def test_good_arguments_pass():
    checked()
    checked(causal="full", kv_lengths=jnp.zeros(2, jnp.int32))
    checked(segment_ids=SegmentIds(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 5), jnp.int32)))
    checked(spec=AttentionSpec(0.5, window=2), query_offsets=jnp.zeros(2, jnp.int32), sinks=jnp.zeros(4, jnp.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": "sideways"}, "causal='sideways'; use 'causal' or 'full'"),
        ({"causal": "full", "spec": AttentionSpec(0.5, window=2)}, "window=2 with causal='full'"),
        ({"causal": "full", "query_offsets": jnp.zeros(2, jnp.int32)}, "query_offsets with causal='full'"),
        ({"q": jnp.zeros((3, 4, 8), jnp.float32)}, r"q is float32\[3, 4, 8\]"),
        ({"k": jnp.zeros((1, 5, 2, 8), jnp.float32)}, r"k is float32\[1, 5, 2, 8\]; it must have shape \[2, 5, 2, 8\]"),
        ({"v": jnp.zeros((2, 6, 2, 8), jnp.float32)}, r"v is float32\[2, 6, 2, 8\]; it must have shape \[2, 5, 2, 8\]"),
        ({"q": jnp.zeros((2, 3, 5, 8), jnp.float32)}, "5 query heads over 2 kv heads"),
        ({"q": jnp.zeros((2, 3, 4, 8), jnp.int32)}, "q is int32"),
        ({"k": jnp.zeros((2, 5, 2, 8), jnp.bfloat16)}, "k is bfloat16.*it must be float32"),
        ({"kv_lengths": jnp.zeros(3, jnp.int32)}, r"kv_lengths is int32\[3\]"),
        ({"query_offsets": jnp.zeros(2, jnp.float32)}, "query_offsets is float32.*int32"),
        ({"sinks": jnp.zeros(2, jnp.float32)}, r"sinks is float32\[2\]"),
        ({"segment_ids": SegmentIds(*[jnp.zeros((2, 5), jnp.int32)] * 2)}, r"segment_ids.queries is int32\[2, 5\]"),
        ({"segment_ids": SegmentIds(*[jnp.zeros((2, 3), jnp.int32)] * 2)}, r"segment_ids.keys is int32\[2, 3\]"),
        ({"segment_ids": SegmentIds(*[jnp.zeros((2, 3), jnp.float32)] * 2)}, r"segment_ids.queries is float32.*int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^flash_attention: .*{message}"):
        checked(**changes)
