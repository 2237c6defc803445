"""Communication: read off a compiled text, implied by the sharding, and its time over a ring."""

import pytest

from jaxinfer.models import llama
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.planner.collectives import Collective, implied, in_text, sharded, total_bytes
from jaxinfer.sharding import make_mesh
from tests.jaxinfer.conftest import CONFIG

GRAPH = Graph.of(llama, llama.TINY, "float32")
TEXT = """
  %all-reduce = bf16[256,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%broadcast_select_fusion.32), channel_id=3, to_apply=%add
  %all-reduce.7 = bf16[256,4096]{1,0} all-reduce(%x), channel_id=4
  %all-reduce-start.1 = f32[8,64]{1,0} all-reduce-start(%y), channel_id=5
  %all-reduce-done.1 = f32[8,64]{1,0} all-reduce-done(%all-reduce-start.1)
  %both = (f32[8]{0}, s32[2]{0}) all-reduce(%a, %b), channel_id=6
  %ag = (f32[4,16]{1,0}, f32[4,64]{1,0}) all-gather-start(%z), dimensions={1}
  %ag2 = f32[256,128256]{0,1:T(8,128)} all-gather(%fusion.2), channel_id=9
  %nested = ((bf16[16,512]{1,0}), bf16[16,512]{1,0}) all-reduce-start(%bitcast), channel_id=3, to_apply=%add.1.clone
  %gathered = ((f32[16,512]{0,1}), f32[16,1024]{0,1}) all-gather-start(%fusion), channel_id=4
  %other = f32[4] fusion(%all-reduce), kind=kLoop
"""


def test_collectives_of_a_text():
    assert set(in_text(TEXT)) == {
        Collective("all-reduce", 256 * 4096 * 2, 2), Collective("all-reduce", 8 * 64 * 4, 1), Collective("all-reduce", 40, 1),
        Collective("all-reduce", 16 * 512 * 2, 1), Collective("all-gather", 16 * 1024 * 4, 1),
        Collective("all-gather", 4 * 64 * 4, 1), Collective("all-gather", 256 * 128256 * 4, 1),
    }  # fmt: skip
    assert in_text("%x = f32[4] add(%a, %b)") == ()


def made(tensor, tokens=16, rows=8):
    return implied(GRAPH, sharded(GRAPH, Placement(make_mesh({"tensor": tensor}))), tokens, rows)


def test_what_the_sharding_implies():
    assert made(1) == ()
    assert list(made(2)) == [Collective("all-reduce", 16 * 64 * 4, 2 * 2 + 1), Collective("all-gather", 8 * 128 * 4, 1)]


def test_heads_that_do_not_divide_are_not_summed():
    assert made(8)[0] == Collective("all-reduce", 16 * 64 * 4, 2 + 1)  # two kv heads over eight shards: attention is whole everywhere


def test_the_compiled_forward_pass_holds_just_that(meshed_plan):
    """Two replicas of two shards; the widest decode and the widest mixed step, and what was implied for them."""
    graph = Graph.of(llama, llama.Config.from_hf(CONFIG), "float32")
    expected = sharded(graph, Placement(make_mesh({"data": 2, "tensor": 2})))
    rows = {row["name"]: row["collectives"] for row in meshed_plan.programs["compiled"]}
    for name, tokens, count in (("decode2", 2, 2), ("decode2-prefill32x2", 34, 4)):
        found = [Collective(**each) for each in rows[name]]
        assert total_bytes(found) == total_bytes(implied(graph, expected, tokens, count))
        assert sum(each.count for each in found if each.kind == "all-reduce") == expected.sums == 2 * 2 + 1


def test_time_over_a_ring():
    bytes, bandwidth = 8 * 10**6, 1e9
    assert Collective("all-reduce", bytes, 3).seconds(4, bandwidth, 0.0) == pytest.approx(3 * 2 * 0.75 * 8e-3)
    assert Collective("all-gather", bytes, 1).seconds(4, bandwidth, 1e-6) == pytest.approx(0.75 * 8e-3 + 3e-6)
    assert Collective("all-reduce", 0, 1).seconds(8, bandwidth, 1e-6) == pytest.approx(14e-6)
