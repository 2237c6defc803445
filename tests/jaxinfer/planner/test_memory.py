"""The pool's size is arithmetic: what is left of the memory, up to what could ever be used, or a clear refusal."""

import math
from dataclasses import replace

import pytest

from jaxinfer.cache.kv import CODES, PoolShape
from jaxinfer.config import CacheConfig, ConfigError
from jaxinfer.models import llama
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.layers import Placement
from jaxinfer.planner.memory import Demand, account, check_programs, plan_memory
from jaxinfer.sharding import make_mesh

GRAPH = Graph.of(llama, llama.TINY, "float32")
MIB = 1 << 20
TOKEN_BYTES = llama.TINY.layers * 2 * llama.TINY.heads.kv_heads * llama.TINY.heads.head_dim * 4


def plan(*, memory=64 * MIB, sequences=8, tokens=256, mesh=None, graph=GRAPH, programs=None, **cache):
    mesh = make_mesh(mesh or {})
    pool = PoolShape(2, cache.get("page_size", 16), mesh.shape["data"], CODES[cache.get("kv_dtype", "auto")])
    return plan_memory(
        graph, pool, Demand(sequences, tokens), CacheConfig(**{"page_size": 16, **cache}), placement=Placement(mesh), device_memory=memory,
        programs=programs,
    )  # fmt: skip


def test_with_plenty_of_memory_every_sequence_may_be_full():
    made = plan()
    assert made.pool == PoolShape(pages=8 * 16 + 1, page_size=16)
    assert made.pool.tokens == 8 * 256
    assert made.weights == GRAPH.nbytes
    assert made.pages == (8 * 256 + 16) * TOKEN_BYTES
    assert made.total == made.weights + made.slots + made.programs + made.pages <= 0.9 * 64 * MIB


def test_little_memory_is_filled_to_its_fraction():
    made = plan(memory=4 * MIB, sequences=64)
    assert 256 <= made.pool.tokens < 64 * 256
    assert made.total <= 0.9 * 4 * MIB < made.total + 2 * 16 * TOKEN_BYTES
    half = plan(memory=4 * MIB, sequences=64, memory_fraction=0.6)
    assert half.total <= 0.6 * 4 * MIB < made.total


def test_the_pool_may_be_given_in_tokens():
    assert plan(kv_tokens=512).pool.tokens == 512
    assert plan(kv_tokens=520).pool.tokens == 512
    assert plan(kv_tokens=10**6, memory=4 * MIB, sequences=64).pool == plan(memory=4 * MIB, sequences=64).pool


def test_a_tensor_axis_halves_what_it_shards():
    one, two = plan(), plan(mesh={"tensor": 2})
    assert two.pages == one.pages / 2
    assert one.weights / 2 <= two.weights < 0.6 * one.weights


def test_replicas_have_pools_of_their_own():
    two = plan(mesh={"data": 2})
    assert two.pool.replicas == 2
    assert two.pool.tokens == 2 * plan().pool.tokens
    assert two.pages == plan().pages
    assert two.weights == plan().weights


def test_quantised_weights_leave_room():
    quantised = plan(graph=Graph.of(llama, llama.TINY, "float32", Quantization("int8")), memory=2 * MIB, sequences=64)
    assert quantised.weights < 0.6 * GRAPH.nbytes
    assert quantised.pool.tokens > plan(memory=2 * MIB, sequences=64).pool.tokens


def test_a_quantised_pool_holds_more_tokens():
    """One byte and a share of a float32 scale for each number of 4 bytes."""
    head_dim = llama.TINY.heads.head_dim
    plain, quantised = plan(), plan(kv_dtype="int8")
    assert quantised.pool == replace(plain.pool, codes="int8")
    assert quantised.pages * 4 * head_dim == plain.pages * (head_dim + 4)
    small = {"memory": 4 * MIB, "sequences": 64}
    assert plan(**small, kv_dtype="fp8").pool.tokens > 2.5 * plan(**small).pool.tokens


def test_too_little_memory_says_how_much_would_fit():
    with pytest.raises(ConfigError, match="KV cache") as caught:
        plan(memory=2 * MIB, tokens=16384)
    assert "16384" in str(caught.value)
    assert all(flag in str(caught.value) for flag in ("--max-model-len", "--memory-fraction", "--quantize", "--kv-dtype"))
    suggested = int(str(caught.value).split("--max-model-len ")[1].split(",")[0])
    assert plan(memory=2 * MIB, tokens=suggested, sequences=8).pool.pages * 16 > suggested


def test_weights_alone_may_be_too_much():
    with pytest.raises(ConfigError, match=r"0\.00 GiB left .* 0 tokens fit"):
        plan(memory=GRAPH.nbytes)


def test_a_given_pool_must_hold_one_sequence():
    with pytest.raises(ConfigError, match="--kv-tokens 128 holds 128 tokens, but one sequence may have 256"):
        plan(kv_tokens=128)
    assert plan(kv_tokens=256).pool.tokens == 256


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 255])
def test_lengths_are_rounded_up_to_pages(tokens):
    assert plan(tokens=tokens, sequences=1).pool.pages == 1 + math.ceil(tokens / 16)


def test_the_compiler_has_the_last_word():
    rough = plan()
    assert not rough.tight
    exact = check_programs(rough, 12345, CacheConfig(page_size=16))
    assert (exact.programs, exact.pool, exact.total) == (12345, rough.pool, rough.total - rough.programs + 12345)
    with pytest.raises(ConfigError, match=r"programs need 0\.06 GiB .* lower --max-step-tokens"):
        check_programs(rough, 64 * MIB, CacheConfig(page_size=16))


def test_a_tight_pool_takes_what_the_programs_leave():
    rough = plan(memory=4 * MIB, sequences=64)
    assert rough.tight
    exact = plan(memory=4 * MIB, sequences=64, programs=rough.programs // 2)
    assert exact.pool.tokens > rough.pool.tokens
    assert exact.total <= 0.9 * 4 * MIB


def test_room_for_more_than_is_wanted():
    """As many sequences as the memory holds would just fit if they were wanted."""
    pool, placement = PoolShape(2, 16), Placement(make_mesh({}))
    asked = lambda sequences: account(GRAPH, pool, Demand(sequences, 256), CacheConfig(), placement=placement, device_memory=64 * MIB)
    few = asked(8)
    room = few.room(1 * MIB, 1)
    assert room > 100 and few.lacking(1 * MIB) < 0
    assert asked(room).pages(1 * MIB) == 16 * room > asked(room + 1).pages(1 * MIB) - 16
    assert asked(room).lacking(1 * MIB, room) <= 0 < asked(room + 1).lacking(1 * MIB, room + 1)
