import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tensorcore
from pallas_kernels.dispatch import Target
from pallas_kernels.tensorcore import Call

KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "7x", "TPU v7x": "7x"}


@pytest.mark.parametrize(("kind", "name"), KINDS.items())
def test_generations_are_known_by_device_kind(kind, name):
    assert tensorcore.generation(kind).name == name
    assert tensorcore.refusal(Target("tpu", kind), {"dtype": "bfloat16"}) is None


def test_other_devices_and_dtypes_are_refused():
    assert "this is NVIDIA H200" in tensorcore.refusal(Target("gpu", "NVIDIA H200"), {})
    assert "this is TPU v4" in tensorcore.refusal(Target("tpu", "TPU v4"), {})
    assert "float16" in tensorcore.refusal(Target("tpu", "TPU v6 lite"), {"dtype": "float16"})
    with tensorcore.interpreted():
        assert tensorcore.refusal(Target("cpu", "cpu"), {}) is None
    assert tensorcore.refusal(Target("cpu", "cpu"), {}) is not None


def test_tiles():
    assert [tensorcore.sublanes(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)] == [8, 16, 32]
    assert [tensorcore.ceil_to(number, 8) for number in (0, 1, 8, 9)] == [0, 8, 8, 16]


def double(x, *, waits):
    """Two times x through a kernel that may forget to wait for its input."""

    def body(copies, scalars, arrays, constants, outputs, scratch):
        buffer, semaphore = scratch
        copies.start(arrays[0], buffer, semaphore)
        if waits:
            copies.wait(arrays[0], buffer, semaphore)
        buffer[...] = buffer[...] * scalars[0][0].astype(jnp.float32) + constants[0][...]
        if not waits:
            copies.wait(arrays[0], buffer, semaphore)
        copies.start(buffer, outputs[0], semaphore)
        copies.wait(buffer, outputs[0], semaphore)

    call = Call(
        "double",
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        [pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        {},
        pl.CostEstimate(flops=x.size, transcendentals=0, bytes_accessed=2 * x.nbytes),
    )
    return tensorcore.run(call, body, (jnp.full(1, 2, jnp.int32),), (x,), (jnp.zeros_like(x),))[0]


def test_a_kernel_runs_and_its_copies_are_counted(simulated):
    x = jnp.asarray(np.arange(1024, dtype=np.float32).reshape(8, 128))
    with tensorcore.counted() as found:
        assert np.array_equal(double(x, waits=True), 2 * x)
    assert found == [2 * x.nbytes]
    assert np.array_equal(double(x, waits=True), 2 * x)
    assert len(found) == 1


def test_a_race_is_found(race_states):
    try:
        double(jnp.ones((8, 128), jnp.float32), waits=False).block_until_ready()
    except RuntimeError as error:  # jax 0.12 raises where it finds one
        assert "RACE DETECTED" in str(error)
        return
    assert any(state.races_found for state in race_states)


def test_a_tile_of_a_weight_divides_its_outputs_if_one_can():
    assert tensorcore.tile_of(96, 4096, 2 << 20) == 96
    assert tensorcore.tile_of(14336, 4096, 2 << 20) == 512
    assert tensorcore.tile_of(16032, 4096, 2 << 20) == 512  # none divides them: the last tile is shorter
    assert tensorcore.tile_of(4096, 1 << 20, 2 << 20) == 128
