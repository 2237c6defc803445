"""What is traced of links that follow one another (the ops' tests run them)."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper_counters import HALF, ROOM

links = pytest.importorskip("pallas_kernels.hopper_links")
folds = pytest.importorskip("pallas_kernels.hopper_folds")
Link = folds.Link
LAYER = [Link(4096, 4096), Link(4096, 28672, True, 1e-5), Link(14336, 4096), Link(4096, 6144, False, 1e-5)]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")
@pytest.mark.parametrize(("count", "sent"), [(4, 3), (3, 2), (1, 0)])
def test_links_are_one_kernel_whose_blocks_wait_for_all_results(monkeypatch, count, sent):
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    chain = LAYER[:count]
    plan = folds.plan_of(chain, jnp.bfloat16, jnp.dtype(jnp.int8), folds.Sizes(folds.SLOTS[0], folds.FLYING[0]))
    shaped = jax.ShapeDtypeStruct
    weights = [shaped((link.outputs, link.inputs), jnp.int8) for link in chain]
    scales = [shaped((link.outputs,), jnp.float32) for link in chain]
    norms = [shaped((4096,), jnp.bfloat16) if link.normed else None for link in chain]
    token = shaped((4096,), jnp.bfloat16)

    def run(x, held, counters, weights, scales, norms):
        return links.run(x, held, weights, scales, norms, jax.new_ref(counters), plan=plan)

    traced = str(jax.make_jaxpr(run)(token, token, shaped((ROOM + 2 * HALF,), jnp.int32), weights, scales, norms))
    assert traced.count("name=_run") == 1
    assert traced.count("function _post") == sent and traced.count("function _take") >= sent
    assert traced.count("leave.<locals>.change") == (sent > 0)
    assert traced.count("function _met") == sum(1 + link.gated for link in chain)
