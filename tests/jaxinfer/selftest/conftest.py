"""The shared tiny engine on the test stand."""

import pytest

from jaxinfer.selftest.stand import Stand


@pytest.fixture
def tested(plain):
    stand = Stand(plain)
    yield stand
    stand.restore()
