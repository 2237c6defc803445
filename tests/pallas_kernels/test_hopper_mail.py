"""What is traced; that numbers arrive only a card shows."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import hopper, hopper_counters, hopper_mail

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")


def traced(body):
    out = jax.ShapeDtypeStruct((2048,), jnp.bfloat16)
    counters = jnp.zeros((hopper_counters.ROOM + 2 * hopper_counters.HALF,), jnp.int32)

    def run(counters):
        return hopper.kernel(body, (), out_type=out, grid={"block": 4})(jax.new_ref(counters))

    return str(jax.make_jaxpr(run)(counters))


def test_what_is_sent_is_waited_for_and_taken():
    shapes = {}

    def body(counters, out, scratch):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        half = hopper_mail.half(counters)
        assert half.dtype == jnp.int32 and half.shape == ()
        values = plgpu.layout_cast(jnp.zeros((16,), jnp.bfloat16), hopper.COLUMNS)
        hopper_mail.post(counters, half, 64 + 16 * lax.axis_index("block"), values)
        for size, count in ((1024, 2), (896, 1), (128, 3)):
            shapes[size] = [(each.shape, each.dtype) for each in hopper_mail.take(counters, half, 64, size, count, jnp.bfloat16)]

    text = traced(body)
    assert shapes == {size: [((size,), jnp.bfloat16)] * count for size, count in ((1024, 2), (896, 1), (128, 3))}
    assert [text.count(f"function {name}") for name in ("_post", "_take")] == [1, 3]


def test_the_other_half_is_cleared():
    assert hopper_counters.HALF % hopper_mail.CLEARED == 0 and hopper_counters.ROOM % 4 == 0
    text = traced(lambda counters, out, scratch: hopper_mail.clear(counters, hopper_mail.half(counters), lax.axis_index("block"), 4))
    assert "while" in text or "scan" in text


def test_room():
    assert hopper_mail.MOST == 2 * hopper_counters.HALF >= 2 * 8192 + 28672  # what a layer of a 70B model passes on
