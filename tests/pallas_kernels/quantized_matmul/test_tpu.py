import pytest

from pallas_kernels import dispatch, tensorcore
from pallas_kernels.dispatch import Target
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.cases import TUNING, Case

V5E = Target("tpu", "TPU v5 lite")
SOON = [
    Case("rows", 5, 384, 256, "bfloat16"),
    Case("both", 3, 256, 160, "bfloat16", activations="int8"),  # the second tile is short
    Case("packed", 3, 512, 256, "bfloat16", "int4", 128, zeros="given"),
]
LATER = [
    Case("packed_narrow", 3, 512, 128, "bfloat16", "int4", 64),
    Case("packed_wide", 37, 1024, 384, "bfloat16", "int4", 512),
    Case("packed_rows", 3, 512, 256, "float32", "int4"),
    Case("packed_both", 5, 512, 256, "bfloat16", "int4", 128, zeros="given", activations="int8"),
    Case("grouped", 70, 512, 256, "bfloat16", "int8", 128),
    Case("grouped_both", 70, 512, 256, "bfloat16", "int8", 128, activations="int8"),
    Case("float8", 20, 256, 256, "bfloat16", "fp8"),
    Case("tiles", 20, 512, 256, "float32", "fp8", 128, 128),
    Case("many", 1100, 256, 256, "bfloat16"),
]


@pytest.mark.parametrize("case", SOON, ids=lambda case: case.name)
def test_against_float64(case, simulated, against_float64):
    against_float64("quantized_matmul", "tpu", case, range(5))


@pytest.mark.ci
@pytest.mark.parametrize("case", [*SOON, *LATER], ids=lambda case: case.name)
def test_at_length(case, simulated, against_float64):
    against_float64("quantized_matmul", "tpu", case, range(5, 22))


def test_many_tokens_of_groups_that_share_vectors_are_refused_aloud(caplog):
    key = Case("many_packed", 257, 512, 256, "bfloat16", "int4", 128).tuning_key()
    with pytest.raises(NotImplementedError, match=r"'tpu': its kernel multiplies groups of 128 for at most 256 tokens, 2 times .* are 257"):
        dispatch.choose("quantized_matmul", "tpu", V5E, key)
    dispatch._log_once.cache_clear()
    assert dispatch.choose("quantized_matmul", "auto", V5E, key) == "xla"
    said = "instead of 'tpu': its kernel multiplies groups"
    assert any(record.levelname == "WARNING" and said in record.message for record in caplog.records)
    assert all(tpu.refusal(V5E, key | changed) is None for changed in ({"tokens": 256}, {"group": 256}, {"group": 0}))


@pytest.mark.parametrize(("case", "most"), [(Case("few", 16, 2048, 512, "bfloat16"), 1.1), (Case("many", 512, 512, 512, "bfloat16"), 1.3)])
def test_bytes_that_are_copied(case, most, simulated):
    inputs = case.make(0)
    with tensorcore.counted() as found:
        case.run(inputs, "tpu").block_until_ready()
    assert case.cost(inputs).bytes <= sum(found) <= most * case.cost(inputs).bytes


def test_refusals_and_sizes():
    for case in TUNING:
        key = case.tuning_key()
        assert tpu.heuristic("tpu", key) in tpu.candidates("tpu", key)
    key = TUNING[1].tuning_key()
    assert dispatch.choose("quantized_matmul", "auto", V5E, key) == "tpu"
    assert "not 96 and" in tpu.refusal(V5E, key | {"in": 96})
    assert "not 4096 and 200" in tpu.refusal(V5E, key | {"out": 200})
    assert tpu.refusal(V5E, key | {"out": 16032}) is None
    assert "not of 96" in tpu.refusal(V5E, key | {"in": 768, "group": 96})
