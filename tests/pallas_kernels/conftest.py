import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, tensorcore

QUICK = {"xla_backend_optimization_level": 0}  # quick to compile
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}  # relative Frobenius error


@pytest.fixture
def interpreted():
    """Kernels for Hopper GPUs run in jax's interpreter, whose state is forgotten afterwards."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax's interpreter of Mosaic GPU knows these kernels from jax 0.11 on")
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    with hopper.interpreted():
        yield
    reset_gpu_interpret_mode_state()


@pytest.fixture
def race_states(monkeypatch):
    """What jax's simulator of TPUs found of races, a state for each kernel that ran."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    states, make = [], interpret_pallas_call.RaceDetectionState
    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", lambda **given: states.append(make(**given)) or states[-1])
    interpret_pallas_call.reset_tpu_interpret_mode_state()
    with tensorcore.interpreted():
        yield states
    interpret_pallas_call.reset_tpu_interpret_mode_state()


@pytest.fixture
def simulated(race_states, request):
    """Kernels for TPUs run in jax's simulator, memory NaN until it is written, and copies never race with their use."""
    yield race_states
    assert race_states or getattr(request.node, "refused", False)  # a case that a kernel refuses is the only one in which none ran
    assert not any(state.races_found for state in race_states)


def widen(x):
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) or x.dtype.itemsize == 1 else x.astype(np.float64)


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


@functools.cache
def oracle(op, case):
    """The reference's function itself, not through the api, whose checks know served dtypes only."""
    call = getattr(importlib.import_module(f"pallas_kernels.{op}.reference"), op)
    names = inspect.signature(call).parameters
    statics = {name: getattr(case, name) for name in ("spec", "causal", "activations", "epsilon", "offset", "forms") if name in names}
    return jax.jit(lambda inputs: call(**dict.fromkeys(names) | statics | inputs), compiler_options=QUICK)


def expected(op, case, seed):
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: jnp.asarray(widen(x)), case.make(seed))
        out, *state = leaves(oracle(op, case)(inputs))
        return [np.asarray(out), *(case.canonical(pool, "reference") for pool in state)]


def relative_error(found, wanted):
    finite = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(found), ~finite), "NaN where there should be none, or the other way round"
    found, wanted = found[finite], wanted[finite]
    return np.sqrt(np.square(found - wanted).sum() / max(np.square(wanted).sum(), 1e-30))


@pytest.fixture
def against_float64():
    """Holds an implementation against the reference in float64, on draws of a case: results and, if there is one, the pool."""

    def check(op, implementation, case, seeds):
        run = jax.jit(lambda inputs: case.run(inputs, implementation), compiler_options=QUICK)
        tolerance = TOLERANCE[case.dtype] + getattr(case, "slack", 0)
        for seed in seeds:
            out, *state = leaves(run(case.make(seed, implementation)))
            wanted, *wanted_state = expected(op, case, seed)
            assert out.dtype == case.dtype
            assert not np.isnan(np.asarray(out, np.float64)).any(), f"seed {seed}"
            assert relative_error(np.asarray(out, np.float64), wanted) <= tolerance, f"seed {seed}"
            for pool, wanted_pool in zip(state, wanted_state, strict=True):
                pool = case.canonical(pool, implementation)[1:]  # all but the guard page
                assert relative_error(pool, wanted_pool[1:]) <= tolerance, f"seed {seed}"

    return check
