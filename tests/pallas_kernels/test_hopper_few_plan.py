"""How the weights of a few tokens' matmuls are folded and dealt out."""

import pytest

from pallas_kernels import hopper

few = pytest.importorskip("pallas_kernels.hopper_few_plan")
folds = pytest.importorskip("pallas_kernels.hopper_folds")
limbs = pytest.importorskip("pallas_kernels.hopper_limbs")
Link = folds.Link
LAYER = [Link(4096, 4096), Link(4096, 28672, True, 1e-5), Link(14336, 4096), Link(4096, 6144, False, 1e-5)]
LARGE = [Link(8192, 8192), Link(8192, 57344, True, 1e-5), Link(28672, 8192), Link(8192, 10240, False, 1e-5)]
ODD = [Link(896, 896), Link(896, 9728, True, 1e-5), Link(4864, 896), Link(896, 1152, False, 1e-5)]
CHAINS = {"8b": LAYER, "70b": LARGE, "odd": ODD, "small": [Link(256, 64)]}
KEY = {"tokens": 8, "dtype": "bfloat16", "weight": "bfloat16", "links": 1, "in0": 4096, "out0": 4096}


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    monkeypatch.setattr(hopper, "cores", lambda: 132)


def plan_of(chain, tokens=16, sizes=few.CANDIDATES[0], stored="bfloat16"):
    return few.plan_of(chain, tokens, "bfloat16", stored, sizes)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(("sizes", "stored"), [*((sizes, "bfloat16") for sizes in few.CANDIDATES), (few.CANDIDATES[0], "int8")])
def test_every_plan_covers_the_weights_and_fits(chain, tokens, sizes, stored):
    if stored == "int8" and chain is ODD:  # 896 inputs are no multiple of 256
        with pytest.raises(ValueError, match="256"):
            plan_of(chain, tokens, sizes, stored)
        return
    plan = plan_of(chain, tokens, sizes, stored)
    assert plan.links == tuple(chain) and 115 <= plan.workers <= 132 and 1 <= plan.flying < plan.stages
    for number, (link, fold) in enumerate(zip(plan.links, plan.folds, strict=True)):
        assert plan.tiles(number) * fold.rows == link.outputs and fold.parts * fold.rows == 64
        assert fold.parts * fold.length * fold.block == link.inputs and fold.block == plan.block
        assert fold.rows // plan.halves(number) * tokens % 128 == 0  # each thread has as many numbers as any other
        assert plan.slots(number) * plan.columns(number) * plan.block * 2 <= plan.room and plan.slots(number) >= 2
        assert plan.most(number) * plan.met(number) * 64 * 4 <= plan.room
        assert not plan.limbs or plan.columns(number) % (4 * plan.cutters) == 0  # each of them has whole groups of rows
    assert plan.sums <= few.MOST_SUMS and plan.stages * few.SLOT + plan.room <= hopper.SHARED_BYTES - 4096


@pytest.mark.parametrize("cores", [132, 114, 78, 60, 16])
@pytest.mark.parametrize("tokens", [8, 16])
def test_there_are_no_more_barriers_than_a_kernel_may_have(monkeypatch, cores, tokens):
    """Whatever there is no room for is refused."""
    monkeypatch.setattr(hopper, "cores", lambda: cores)
    refused = 0
    for chain in (LAYER, LARGE, ODD, [Link(5120, 5120), Link(5120, 51200, True, 1e-5), Link(25600, 5120), Link(5120, 10240, False, 1e-5)]):
        try:
            plan = plan_of(chain, tokens)
        except ValueError:
            refused += 1
            continue
        assert max(map(plan.slots, range(len(chain)))) <= 32 and plan.sums <= few.MOST_SUMS
    assert refused <= (4 if cores == 16 else 3)


def test_squares_are_summed_by_warps():
    plan = plan_of([Link(128, 512, gated=True), Link(256, 256, epsilon=1e-5)], 8)
    assert plan.folds[0].rows == 64 and plan.halves(0) == 2 and plan.squares(0) == 8
    assert plan_of([Link(128, 512), Link(512, 256, epsilon=1e-5)], 8).squares(0) == 16


def test_the_op_joins_what_there_is_a_kernel_for():
    from pallas_kernels.token_chain import api

    assert api.MOST["int8"] == few.MOST < api.MOST["bfloat16"] and set(api.MOST) == set(few.STORED)


@pytest.mark.parametrize(("tokens", "stages"), [(8, 11), (16, 9)])
@pytest.mark.parametrize("stored", few.STORED)
def test_an_8b_layer_is_dealt_out_evenly(tokens, stages, stored):
    plan = plan_of(LAYER, tokens, stored=stored)
    assert [plan.most(number) * fold.rows for number, fold in enumerate(plan.folds)] == [32, 224, 32, 48]
    assert plan.workers == 128 and plan.stages == stages and plan.before_norms == [0, 2]
    assert (plan.parts, plan.copies) == (4, 4) and [plan.squares(number) for number in (0, 2)] == [tokens, tokens]
    assert all(plan.tiles(number) % plan.workers == 0 for number in range(4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"weight": "int8"}, None),
        ({"weight": "int8", "in0": 4096 + 128}, "inputs in multiples of 256 and outputs in multiples of 64"),
        ({"weight": "mixed"}, "weights that are all so, or all int8, not bfloat16 and mixed"),
        ({"tokens": 17}, "up to 16 tokens, not 17"),
        ({"tokens": 1}, "up to 16 tokens, not 1"),
        ({"dtype": "float16", "weight": "float16"}, "not float16 and float16"),
        ({"in0": 4096 + 64}, "inputs in multiples of 128 and outputs in multiples of 64, of some links of 32 or 16, not 4160 and 4096"),
        ({"out0": 4096 + 8}, "not 4096 and 4104"),
        ({"out0": 1 << 20, "tokens": 16}, "no room for 1048576 outputs of 16 tokens"),
    ],
)
def test_what_it_refuses(changes, reason):
    found = few.refusal(KEY | changes)
    assert found is None if reason is None else reason in found


def test_limbs_take_as_many_sums_as_tokens_have():
    """Not as many as columns, beside the products of one slot."""
    plan = plan_of(LAYER, 16, stored="int8")
    assert plan.limbs and plan.cutters == 2 and plan.block == limbs.BLOCK
    assert [plan.columns(number) for number in range(4)] == [32, 32, 32, 64] and plan.sums == 7 * 16 // 2 + 2 * 32 // 2
    plain = plan_of(LAYER, 16)
    assert not plain.limbs and plain.cutters == 0 and plain.met(1) == 32 and plain.sums == 7 * 32 // 2


def test_tokens_are_filled_up():
    assert [few.padded(tokens) for tokens in (2, 8, 9, 16)] == [8, 8, 16, 16]
