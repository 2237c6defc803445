"""The table of efficiencies: every chip finds every row it needs, and each says where it comes from."""

import pytest

from jaxinfer.devices import CHIPS, find_chip
from jaxinfer.planner.efficiency import Row, find, table
from jaxinfer.planner.topology import CPU

H200, V6E = find_chip("NVIDIA H200"), find_chip("TPU v6e")


@pytest.mark.parametrize("chip", [*CHIPS, CPU], ids=lambda chip: chip.name)
def test_every_chip_has_what_a_prediction_needs(chip):
    for weights in ("bfloat16", "int8", "a scheme to come", "float32"):
        assert 0 < find(chip, "matmul", implementation="xla", weights=weights).at(64) <= 1
    for phase in ("decode", "prefill"):
        assert 0 < find(chip, f"attention_{phase}", implementation="xla").number("share") <= 1
    assert find(chip, "small").at(1) > 0 and 0 < find(chip, "link").number("share") <= 1


def test_a_chip_of_its_own_comes_before_its_platform():
    assert find(H200, "small").measured and not find(find_chip("NVIDIA H100"), "small").measured
    own, xla = (find(V6E, "attention_decode", implementation=name).number("share") for name in ("tpu", "xla"))
    assert own > xla


def test_what_is_not_there_is_an_error():
    with pytest.raises(LookupError, match="no row of attention_decode for NVIDIA H200"):
        find(H200, "attention_decode", implementation="abacus")


def test_points_are_interpolated_and_hold_beyond():
    row = Row({"points": {"1": 0.8, "16": 0.6, "256": 0.4}}, "measured: here")
    assert [row.at(rows) for rows in (0.5, 1, 16, 256, 9999)] == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.4])
    assert row.at(4) == pytest.approx(0.7) and row.measured
    assert Row({"points_us": {"1": 5, "65": 21}}, "assumed").at(33) == pytest.approx(13)


def test_every_row_has_a_source():
    assert all(row["source"].startswith(("measured: ", "assumed")) for row in table())
    assert not any(row["source"].startswith("measured") for row in table() if row["chip"] in ("tpu", "gpu", "cpu"))
