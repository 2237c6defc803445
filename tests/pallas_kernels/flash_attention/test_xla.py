import jax
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.flash_attention import xla
from pallas_kernels.flash_attention.cases import EVERYTHING, Case

QUICK = {"xla_backend_optimization_level": 0}  # quick to compile


def compiled(case, sizes):
    with tuning.forced(sizes._asdict()):
        return jax.jit(lambda inputs: case.run(inputs, "xla")).lower(case.make(0)).compile(QUICK)


def test_block_sizes_change_rounding_only():
    case = Case("x", queries=30, keys=50, head_dim=16, window=20, extras=EVERYTHING)
    runs = [compiled(case, xla.Sizes(*sizes)) for sizes in ((8, 16), (30, 64), (7, 50))]
    for seed in range(5):
        inputs = case.make(seed)
        first, *others = (np.asarray(run(inputs)) for run in runs)
        for other in others:
            np.testing.assert_allclose(first, other, atol=2e-6)


def test_an_entry_depends_on_itself_alone():
    case = Case("x", queries=20, keys=60, head_dim=16, causal="full", extras=frozenset({"kv_lengths"}))
    run = compiled(case, xla.Sizes(8, 16))
    for seed in range(5):
        inputs = case.make(seed)
        together = np.asarray(run(inputs))
        alone = np.asarray(run(inputs | {"kv_lengths": inputs["kv_lengths"].at[1].set(0)}))
        assert np.array_equal(together[0], alone[0])
        assert not alone[1].any()


def test_scores_are_never_whole():
    temporary = [
        jax.jit(lambda inputs, case=case: case.run(inputs, "xla")).lower(case.make(0)).compile(QUICK).memory_analysis().temp_size_in_bytes
        for case in (Case("x", batch=1, queries=256, keys=keys, kv_heads=1, group=1, head_dim=8) for keys in (2048, 8192))
    ]
    whole = 256 * 8192 * 4
    assert temporary[1] < whole / 4
    assert temporary[1] - temporary[0] < whole / 8


def test_candidates_run_from_the_heuristic():
    key = Case("x").tuning_key()
    for platform in ("cpu", "gpu", "tpu"):
        assert xla.heuristic(platform, key) in xla.candidates(platform, key)
