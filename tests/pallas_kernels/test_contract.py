"""Every implementation of every op, over the op's cases, many random draws each, against the reference in float64.

The data comes from the op's cases.py: ragged and empty rows, page edges, shuffled tables, NaN wherever no row has data.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

DRAWS = 20
INTERPRETED_DRAWS = 2
QUICK = {"xla_backend_optimization_level": 0}  # quick to compile
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}  # relative Frobenius error


def cases_of(op):
    return importlib.import_module(f"pallas_kernels.{op}.cases").CASES


ALL = [
    pytest.param(op, implementation, case, id=f"{op}-{implementation}-{case.name}")
    for op in dispatch.ops()
    for implementation in dispatch.implementations(op)
    if implementation != "reference"
    for case in cases_of(op)
]


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
    statics = {name: getattr(case, name) for name in ("spec", "causal", "activations") if name in names}
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
def draws(implementation, request):
    """How many; kernels for another platform run in its interpreter, which takes its time."""
    if implementation != "gpu":
        return DRAWS
    request.getfixturevalue("interpreted")
    return INTERPRETED_DRAWS


@pytest.mark.parametrize(("op", "implementation", "case"), ALL)
def test_against_float64(op, implementation, case, draws):
    refused = dispatch.refusal(op, implementation, dispatch.target(), case.tuning_key())
    if refused is not None:
        pytest.skip(refused)
    run = jax.jit(lambda inputs: case.run(inputs, implementation), compiler_options=QUICK)
    tolerance = TOLERANCE[case.dtype] + getattr(case, "slack", 0)
    for seed in range(draws):
        out, *state = leaves(run(case.make(seed, implementation)))
        wanted, *wanted_state = expected(op, case, seed)
        assert out.dtype == case.dtype
        assert not np.isnan(np.asarray(out, np.float64)).any(), f"seed {seed}"
        assert relative_error(np.asarray(out, np.float64), wanted) <= tolerance, f"seed {seed}"
        for pool, wanted_pool in zip(state, wanted_state, strict=True):
            pool = case.canonical(pool, implementation)[1:]  # all but the guard page
            assert relative_error(pool, wanted_pool[1:]) <= tolerance, f"seed {seed}"


@pytest.mark.parametrize("op", dispatch.ops())
def test_folder_is_complete(op):
    assert {"reference", "xla"} <= set(dispatch.implementations(op))
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    names = [case.name for case in (*cases.CASES, *cases.TUNING, *getattr(cases, "BENCH", ()))]
    assert len(names) == len(set(names))
    importlib.import_module(f"pallas_kernels.{op}.api")
