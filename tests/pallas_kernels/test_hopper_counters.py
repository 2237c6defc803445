"""What is traced; that blocks of threads really wait for each other only a card shows."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, hopper, hopper_counters
from pallas_kernels.dispatch import Target

H200 = Target("gpu", "NVIDIA H200")
NEW = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cannot be traced before")


def test_counters_are_zeros_and_not_for_the_interpreter(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with dispatch.assumed(H200):
        made = hopper_counters.made()
        assert made.shape == (hopper_counters.ROOM + 2 * hopper_counters.HALF,) and not made[...].any()
        with hopper.interpreted():
            assert hopper_counters.made() is None


def kernel_of(body, *scratch):
    out = jax.ShapeDtypeStruct((128,), jnp.float32)
    counters = jnp.zeros((hopper_counters.ROOM + 2 * hopper_counters.HALF,), jnp.int32)

    def run(counters):
        return hopper.kernel(body, scratch, out_type=out, grid={"block": 4})(jax.new_ref(counters))

    return str(jax.make_jaxpr(run)(counters))


@NEW
def test_blocks_leave():
    traced = kernel_of(lambda counters, out, scratch: hopper_counters.leave(counters, 4))
    assert traced.count("leave.<locals>.change") == 1


@NEW
def test_the_last_one_clears_its_place():
    def body(counters, out, scratch):
        (told,) = scratch
        done = hopper_counters.last(counters, hopper_counters.FIRST + jax.lax.axis_index("block"), jnp.int32(3), told)
        assert done.dtype == jnp.bool_ and done.shape == ()

    from jax.experimental.pallas import mosaic_gpu as plgpu

    traced = kernel_of(body, plgpu.SMEM((1,), jnp.int32))
    assert traced.count("last.<locals>.count") == 1 and traced.count("_leave_zeros.<locals>.work") == 1
    assert traced.index("last.<locals>.count") < traced.index("_leave_zeros.<locals>.work")


@NEW
def test_blocks_wait_for_each_other_and_zeros_stay():
    def body(counters, out, scratch):
        hopper_counters.tell(counters, 1)
        hopper_counters.wait(counters, 1, 4)
        hopper_counters.clear(counters, 2)

    traced = kernel_of(body)
    places = [traced.index(name) for name in ("tell.<locals>.count", "wait.<locals>.look", "_leave_zeros.<locals>.work")]
    assert places == sorted(places)
