import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tensorcore, tensorcore_clock
from pallas_kernels.generations import V5E, V5P, V6E
from pallas_kernels.tensorcore import Call
from pallas_kernels.tensorcore_clock import DRAIN, LATENCY, LOOP

TILE = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)  # 4 MiB
SIZE = 4 << 20


def seconds(body, scalars, generation, *, cores=1, arrays=(TILE,), scratch=()):
    """What the clock says of a kernel of ours."""
    cost = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0)
    call = Call("test", [TILE], scratch, {}, cost, cores)
    with tensorcore.recorded() as found:
        jax.eval_shape(lambda *arrays: tensorcore.run(call, body, [np.array(x, np.int32) for x in scalars], arrays)[0], *arrays)
    return tensorcore_clock.seconds(tensorcore_clock.program(found[0]), generation)


def copying(*, ahead):
    """A kernel that copies a tile as often as its scalar says, one at a time or one ahead."""

    def body(copies, scalars, arrays, constants, outputs, scratch):
        (buffer, done), count = scratch, scalars[0][0]

        def copy(slot, *, start):
            (copies.start if start else copies.wait)(arrays[0], buffer.at[slot], done.at[slot])

        def step(number, _):
            slot = lax.rem(number, jnp.int32(2))
            if ahead:
                pl.when(number + 1 < count)(lambda: copy(1 - slot, start=True))
            else:
                copy(slot, start=True)
            copy(slot, start=False)

        if ahead:
            copy(jnp.int32(0), start=True)
        lax.fori_loop(0, count, step, None)

    return body


BUFFERS = (pltpu.VMEM((2, 1024, 1024), jnp.float32), pltpu.SemaphoreType.DMA((2,)))


@pytest.mark.parametrize(("ahead", "latencies"), [(False, 7), (True, 1)])
def test_copies_that_are_ahead_hide_their_latency(ahead, latencies):
    found = seconds(copying(ahead=ahead), [[7]], V5E, scratch=BUFFERS)
    assert found == pytest.approx(7 * SIZE / V5E.bandwidth + latencies * LATENCY, rel=0.02)


def test_the_cores_of_a_device_share_its_bandwidth():
    one, two = (seconds(copying(ahead=True), [[7]], V5P, cores=cores, scratch=BUFFERS) for cores in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)


def multiplying(left, right):
    def body(copies, scalars, arrays, constants, outputs, scratch):
        def step(_, __):
            product = lax.dot_general(scratch[0][...], scratch[1][...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            scratch[2][...] = product

        lax.fori_loop(0, scalars[0][0], step, None)

    shapes = (pltpu.VMEM(left, jnp.bfloat16), pltpu.VMEM(right, jnp.bfloat16), pltpu.VMEM((left[0], right[0]), jnp.float32))
    return body, shapes


@pytest.mark.parametrize(
    ("generation", "left", "right", "tiles", "rows"),
    [
        (V5E, (512, 256), (384, 256), 2 * 3, 512),
        (V6E, (512, 128), (384, 128), 1 * 2, 512),  # half filled
        (V5E, (16, 256), (256, 256), 2 * 2, 128),  # loading the tiles takes longer
    ],
)
def test_products_are_tiles_of_the_matrix_unit(generation, left, right, tiles, rows):
    body, scratch = multiplying(left, right)
    one = tiles * rows * 2 * generation.side**2 / generation.bf16_rate + (DRAIN + LOOP) / generation.clock
    assert seconds(body, [[9]], generation, scratch=scratch) == pytest.approx(9 * one, rel=0.05)


def test_the_way_is_that_of_the_scalars():
    def body(copies, scalars, arrays, constants, outputs, scratch):
        pl.when(scalars[0][0] % 3 == 1)(lambda: copying(ahead=False)(copies, [scalars[1]], arrays, constants, outputs, scratch))

    assert seconds(body, [[4], [2]], V5E, scratch=BUFFERS) > 2 * SIZE / V5E.bandwidth
    assert seconds(body, [[3], [2]], V5E, scratch=BUFFERS) < 1e-7


def branching(copies, scalars, arrays, constants, outputs, scratch):
    pl.when(jnp.sum(scratch[0][...]) > 0)(lambda: copying(ahead=False)(copies, scalars, arrays, constants, outputs, scratch))


def looping(copies, scalars, arrays, constants, outputs, scratch):
    copying(ahead=False)(copies, [jnp.sum(scratch[0][0]).astype(jnp.int32)[None]], arrays, constants, outputs, scratch)


@pytest.mark.parametrize(("body", "what"), [(branching, "a branch"), (looping, "a loop")])
def test_what_depends_on_data_is_refused(body, what):
    with pytest.raises(ValueError, match=f"{what} of the kernel depends on what is no scalar"):
        seconds(body, [[1]], V5E, scratch=BUFFERS)


def test_what_the_clock_does_not_know_is_refused():
    def body(copies, scalars, arrays, constants, outputs, scratch):
        copying(ahead=False)(copies, [lax.population_count(scalars[0][0])[None]], arrays, constants, outputs, scratch)

    with pytest.raises(ValueError, match="does not know the operation 'population_count' on scalars"):
        seconds(body, [[1]], V5E, scratch=BUFFERS)
