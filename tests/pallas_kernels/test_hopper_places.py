import inspect

import numpy as np
import pytest

from pallas_kernels import hopper_places
from pallas_kernels.flash_attention import gpu
from pallas_kernels.hopper import TILE
from pallas_kernels.paged_attention import gpu_prefill


@pytest.mark.parametrize("protocol", ["Queries", "Keys"])
@pytest.mark.parametrize("module", [gpu, gpu_prefill])
def test_both_ops_say_where_things_lie(module, protocol):
    wanted, found = getattr(hopper_places, protocol), getattr(module, protocol)
    for name, member in vars(wanted).items():
        if not name.startswith("_") and inspect.isfunction(member):
            assert list(inspect.signature(getattr(found, name)).parameters) == list(inspect.signature(member).parameters)


@pytest.mark.parametrize("queries", [gpu.Queries(1), gpu.Queries(8), gpu_prefill.Queries(3), gpu_prefill.Queries(16)])
def test_each_token_has_its_lines(queries):
    tokens = np.asarray(queries.token(np.arange(TILE, dtype=np.int32)))
    counts = np.bincount(tokens)[: queries.tokens]
    assert (counts == counts[0]).all()
    assert counts[0] == TILE // queries.tokens
