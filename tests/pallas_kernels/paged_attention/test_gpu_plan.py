from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import HEAD_DIMS
from pallas_kernels.paged_attention import gpu_plan
from pallas_kernels.paged_attention.gpu import MAX_CODES_DIM, heuristic
from pallas_kernels.paged_attention.gpu_pages import Pages


def test_shared_memory_suffices():
    for head_dim in HEAD_DIMS:
        stages = heuristic("gpu", {"head_dim": head_dim})["decode_stages"]
        assert gpu_plan.shared_bytes(head_dim, stages) <= hopper.SHARED_BYTES
        assert head_dim > MAX_CODES_DIM or gpu_plan.shared_bytes(head_dim, stages, codes=True) <= hopper.SHARED_BYTES
        for padded in (8, 16, 64):
            found = gpu_plan.stages_that_fit(stages, head_dim, padded, codes=False)
            assert 2 <= found <= stages and gpu_plan.shared_bytes(head_dim, found, padded=padded) <= hopper.SHARED_BYTES
    assert [gpu_plan.streams(head_dim) for head_dim in (64, 128, 256)] == [2, 2, 1]


def plan(page_size, **changes):
    return gpu_plan.Plan(AttentionSpec(1.0), Pages(3, page_size, 8), 1, 8, 3, 2, 2, group=4, **changes)


def test_one_copy_brings_keys_and_values_where_they_lie_together():
    assert [plan(page).together for page in (32, 64, 128)] == [False, True, False]


def test_heads_are_tiles_of_kv_heads():
    assert plan(64, tokens=4, tiles=2).heads == 6


def test_registers_of_all_warpgroups_are_there():
    for found in (plan(64), plan(64, codes="int8"), plan(64)._replace(streams=1)):
        assert found.streams * 128 * sum(found.registers) <= 65536
