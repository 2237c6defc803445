"""Counters that the kernels of one program share, where there are kernels that count."""

import importlib
from typing import Any

from pallas_kernels import dispatch


def shared_counters() -> Any:
    """A reference to a program's counters, made once inside its trace and handed to the ops that ask for it; None where nothing counts.

    Kernels that have it run one after another: see `hopper_counters`, which is imported on GPUs alone.
    """
    if dispatch.target().platform != "gpu":
        return None
    return importlib.import_module("pallas_kernels.hopper_counters").made()


def counted(case: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A case's inputs with a program's counters, if its op takes any."""
    return case.counted(inputs, shared_counters()) if hasattr(case, "counted") else inputs
