"""How weights are folded and dealt out."""

import jax.numpy as jnp
import pytest

from pallas_kernels import hopper, hopper_token

folds = pytest.importorskip("pallas_kernels.hopper_folds")
Link = folds.Link
LAYER = [Link(4096, 4096), Link(4096, 28672, True, 1e-5), Link(14336, 4096), Link(4096, 6144, False, 1e-5)]
LARGE = [Link(8192, 8192), Link(8192, 57344, True, 1e-5), Link(28672, 8192), Link(8192, 10240, False, 1e-5)]
ODD = [Link(896, 896), Link(896, 9728, True, 1e-5), Link(4864, 896), Link(896, 1152, False, 1e-5)]
CHAINS = {"8b": LAYER, "70b": LARGE, "odd": ODD, "head": [Link(4096, 128256)], "small": [Link(128, 64)]}


@pytest.fixture
def a_card(monkeypatch):
    monkeypatch.setattr(hopper, "cores", lambda: 132)


def plan_of(chain, stored, slot=folds.SLOTS[0], flying=folds.FLYING[0]):
    return folds.plan_of(chain, jnp.bfloat16, jnp.dtype(stored), folds.Sizes(slot, flying))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
@pytest.mark.parametrize("slot", folds.SLOTS)
@pytest.mark.parametrize("flying", folds.FLYING)
def test_every_plan_covers_the_weights_and_fits(a_card, chain, stored, slot, flying):
    plan, size = plan_of(chain, stored, slot, flying), jnp.dtype(stored).itemsize
    assert plan.links == tuple(chain) and 1 <= plan.workers <= 132
    assert plan.stages >= folds.LEAST and 1 <= plan.flying <= plan.stages
    for number, (link, fold) in enumerate(zip(plan.links, plan.folds, strict=True)):
        assert plan.tiles(number) * fold.rows == link.outputs and fold.parts * fold.rows == 64
        assert fold.parts * fold.length * fold.block == link.inputs
        assert fold.rows % (16 if link.gated else 8) == 0
        assert 64 * fold.block * size <= slot and slot % (64 * fold.block * size) == 0 and fold.block * size % 128 == 0
    token = max(a * b * c * size for a, b, c in plan.rooms)
    sums = 4 * 64 * max(plan.columns)
    assert plan.stages * slot + token + sums <= hopper.SHARED_BYTES - 2048


@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
def test_an_8b_layer_is_dealt_out_evenly(a_card, stored):
    plan = plan_of(LAYER, stored)
    busiest = [-(-plan.tiles(number) // plan.workers) * fold.rows for number, fold in enumerate(plan.folds)]
    assert busiest == [32, 224, 32, 48]


@pytest.mark.parametrize(("stored", "bytes_"), [("int8", 57344), ("bfloat16", 57344)])
def test_a_token_takes_the_room_that_is_worth_it(a_card, stored, bytes_):
    plan = plan_of(LAYER, stored)
    assert max(a * b * c * jnp.dtype(stored).itemsize for a, b, c in plan.rooms) == bytes_ <= folds.ROOM
    assert [fold.parts for fold in plan.folds] == ([2, 2, 2, 4] if stored == "int8" else [2, 2, 4, 4])


def test_sizes_of_before_are_understood():
    assert folds.Sizes(**{"slot": folds.SLOTS[1]}).flying == folds.FLYING[0]


def test_a_token_that_leaves_no_room_is_refused(a_card):
    with pytest.raises(ValueError, match=r"slots of 32768 bytes: no way to fold Link\(inputs=18816"):
        plan_of([Link(4096, 64), Link(18816, 64)], "int8", folds.SLOTS[1])
    assert folds.folds(Link(18816, 64), jnp.int8, folds.SLOTS[0]) and not folds.folds(Link(29568, 64), jnp.int8, folds.SLOTS[0])


@pytest.mark.parametrize(
    ("link", "parts"),
    [
        (Link(4096, 64), [1, 2, 4, 8]),
        (Link(4096, 64, gated=True), [1, 2, 4]),
        (Link(128, 64), [1]),
        (Link(384, 96), []),
        (Link(512, 96), [2, 4]),
        (Link(2304, 96), [2]),
        (Link(65536, 64), []),
        (Link(4096, 40), [8]),
    ],
)
def test_how_a_weight_can_be_folded(link, parts):
    assert [fold.parts for fold in folds.folds(link, jnp.int8, folds.SLOTS[0])] == parts


def test_how_a_token_meets_a_weight():
    assert isinstance(folds.right_of(jnp.dtype(jnp.int8)), hopper_token.Limbs)
    assert folds.right_of(jnp.dtype(jnp.float16)).stored == jnp.float16
