import jax
import pytest

from pallas_kernels import hopper


@pytest.fixture
def interpreted():
    """Kernels for Hopper GPUs run in jax's interpreter, whose state is forgotten afterwards."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax's interpreter of Mosaic GPU knows these kernels from jax 0.11 on")
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    with hopper.interpreted():
        yield
    reset_gpu_interpret_mode_state()
