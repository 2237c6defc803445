"""One plan of a tiny model for four virtual CPU devices, compiled once for all tests of this folder."""

import pytest

from jaxinfer.planner import child
from tests.jaxinfer.conftest import CONFIG

ENGINE = {"page_size": 4, "max_step_tokens": 32, "dtype": "float32", "compilation_cache": "off"}


def request(slice="cpu-4", *, values=CONFIG, config=(), **changed):
    """What planning.py sends to a child."""
    asked = {
        "model": "small", "slice": slice, "values": dict(values), "config": {**ENGINE, **dict(config)}, "context": 64, "concurrency": 4,
        "output": 16, "goal": "throughput", "price": None, "mesh": None, "compile": False, "all": False,
    }  # fmt: skip
    return {**asked, **changed}


def planned(*args, **changed):
    """A plan, in this process."""
    return child.planned(request(*args, **changed), lambda *_: None)


@pytest.fixture(scope="session")
def meshed_plan():
    """Two replicas of two shards."""
    return planned(mesh=[2, 2], compile=True, price=3.0)
