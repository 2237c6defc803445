"""No benchmark of the suite waits to see what else its machine does: nothing that they measure counts."""

import pytest

from jaxinfer.bench import rows

watch = rows.busy


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody sleeps to watch the processors, unless a test says for how long."""
    monkeypatch.setattr(rows, "busy", lambda seconds=0.0: watch(seconds))
