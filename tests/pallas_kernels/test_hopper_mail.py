"""What is cleared, in jax's interpreter; what is traced of the rest: that numbers arrive only a card shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import hopper, hopper_counters
from pallas_kernels.hopper_counters import HALF, ROOM, TURN

mail = pytest.importorskip("pallas_kernels.hopper_mail")
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")


def kernel_of(body, blocks=4):
    out = jax.ShapeDtypeStruct((128,), jnp.float32)
    return hopper.kernel(body, (), out_type=out, grid={"block": blocks})


def test_what_is_sent_is_waited_for_and_taken():
    found = []

    def body(counters, out, scratch):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from pallas_kernels.hopper_token import OWN

        own = mail.Mail.of(counters)
        assert own.half.dtype == jnp.int32 and own.half.shape == ()
        own.post(64 + 16 * lax.axis_index("block"), plgpu.layout_cast(jnp.zeros((128,), jnp.bfloat16), OWN), 16)
        found.extend(own.take(64, [pl.ds(0, 1024), pl.ds(1024, 1024), pl.ds(2048, 896)], jnp.bfloat16))

    counters = jnp.zeros((ROOM + 2 * HALF,), jnp.int32)
    text = str(jax.make_jaxpr(lambda counters: kernel_of(body)(jax.new_ref(counters)))(counters))
    assert [(each.shape, each.dtype) for each in found] == [((size,), jnp.bfloat16) for size in (1024, 1024, 896)]
    assert [text.count(f"function {name}") for name in ("_post", "_take")] == [1, 2]  # the rest has a size of its own


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_kernel_clears_the_half_that_is_not_its_own(interpreted, turn, blocks):
    def body(counters, out, scratch):
        mail.Mail.of(counters).clear(lax.axis_index("block"), blocks)

    def run(counters):
        held = jax.new_ref(counters)
        kernel_of(body, blocks)(held)
        return held[...]

    before = np.full(ROOM + 2 * HALF, 7, np.int32)
    before[TURN] = turn
    found, other = np.array(run(jnp.asarray(before))), slice(ROOM + (1 - turn) * HALF, ROOM + (2 - turn) * HALF)
    assert not found[other].any()
    found[other] = 7
    assert np.array_equal(found, before)


def test_room():
    assert mail.MOST == 2 * hopper_counters.HALF >= 2 * 8192 + 28672  # what a layer of a 70B model passes on
    assert ROOM % 4 == 0  # vectors of four words begin where they may
