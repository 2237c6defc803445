from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import HEAD_DIMS
from pallas_kernels.paged_attention import gpu_plan
from pallas_kernels.paged_attention.gpu import MAX_CODES_DIM, heuristic
from pallas_kernels.paged_attention.gpu_pages import Pages


def test_shared_memory_suffices():
    for head_dim in HEAD_DIMS:
        sizes, codes = heuristic("gpu", {"head_dim": head_dim}), [False, *([True] if head_dim <= MAX_CODES_DIM else [])]
        streams, stages = gpu_plan.streams_that_fit(sizes["decode_streams"], head_dim), sizes["decode_stages"]
        assert all(gpu_plan.shared_bytes(streams, head_dim, stages, codes=each) <= hopper.SHARED_BYTES for each in codes)
        for padded in (8, 16, 64):
            streams = gpu_plan.streams_that_fit(sizes["decode_streams"], head_dim, padded)
            found = gpu_plan.stages_that_fit(stages, streams, head_dim, padded, codes=False)
            assert 2 <= found <= stages and gpu_plan.shared_bytes(streams, head_dim, found, padded=padded) <= hopper.SHARED_BYTES
        assert all(gpu_plan.stages_that_fit(2, 3, head_dim, 8, codes=each) == 2 for each in codes if head_dim <= 128)


def test_as_many_streams_as_there_are_registers_for():
    assert [gpu_plan.streams_that_fit(2, head_dim) for head_dim in (64, 128, 256)] == [2, 2, 1]
    assert [gpu_plan.streams_that_fit(3, 128, padded) for padded in (8, 16)] == [3, 2]


def plan(page_size, **changes):
    return gpu_plan.Plan(AttentionSpec(1.0), Pages(3, page_size, 8), 1, 8, 3, 2, 2, group=4, **changes)


def test_one_copy_brings_keys_and_values_where_they_lie_together():
    assert [plan(page).together for page in (32, 64, 128)] == [False, True, False]


def test_heads_are_tiles_of_kv_heads():
    assert plan(64, tokens=4, tiles=2).heads == 6


def test_registers_of_all_warpgroups_are_there():
    several = (plan(64), plan(64, codes="int8"), plan(64)._replace(streams=1), plan(64, codes="int8")._replace(streams=1))
    for found in (*several, *(each._replace(streams=3) for each in several[:2])):
        assert found.streams * sum(found.registers) <= 2 * found.streams * hopper.registers_of(2 * found.streams)
