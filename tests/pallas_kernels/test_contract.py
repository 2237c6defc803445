"""Every implementation of every op, over the op's cases, many random draws each, against the reference in float64.

The data comes from the op's cases.py: ragged and empty rows, page edges, shuffled tables, NaN wherever no row has data.
"""

import importlib

import pytest

from pallas_kernels import dispatch

DRAWS = 6
MORE_DRAWS = 16  # in the longer pass
INTERPRETED_DRAWS = 2
FIXTURES = {"gpu": "interpreted", "tpu": "simulated"}


def cases_of(op):
    return importlib.import_module(f"pallas_kernels.{op}.cases").CASES


def longer(implementation, case):
    """The TPU's simulator takes its time, and on a CPU narrow numbers of a quantised pool are another rounding of the same path."""
    return implementation == "tpu" or (implementation == "xla" and case.name in ("fp8_bfloat16", "int8_bfloat16", "mixed_bfloat16"))


ALL = [
    pytest.param(op, implementation, case, id=f"{op}-{implementation}-{case.name}", marks=[pytest.mark.ci] * longer(implementation, case))
    for op in dispatch.ops()
    for implementation in dispatch.implementations(op)
    if implementation != "reference"
    for case in cases_of(op)
]


@pytest.fixture
def draws(implementation, request):
    """How many; kernels for another platform run in its interpreter, which takes its time."""
    if implementation in FIXTURES:
        request.getfixturevalue(FIXTURES[implementation])
    return INTERPRETED_DRAWS if implementation in FIXTURES else DRAWS


@pytest.mark.parametrize(("op", "implementation", "case"), ALL)
def test_against_float64(op, implementation, case, draws, against_float64, request):
    refused = dispatch.refusal(op, implementation, dispatch.target(), case.tuning_key())
    if refused is not None:
        request.node.refused = True
        pytest.skip(refused)
    against_float64(op, implementation, case, range(draws))


@pytest.mark.ci
@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.name}") for op in dispatch.ops() for case in cases_of(op)])
def test_more_draws(op, case, against_float64):
    against_float64(op, "xla", case, range(DRAWS, MORE_DRAWS))


@pytest.mark.parametrize("op", dispatch.ops())
def test_folder_is_complete(op):
    assert {"reference", "xla"} <= set(dispatch.implementations(op))
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    names = [case.name for case in (*cases.CASES, *cases.TUNING, *getattr(cases, "BENCH", ()))]
    assert len(names) == len(set(names))
    importlib.import_module(f"pallas_kernels.{op}.api")
