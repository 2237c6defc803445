import pytest

from jaxinfer import devices
from pallas_kernels import generations


@pytest.mark.parametrize("each", generations.BY_NAME.values(), ids=lambda each: each.name)
def test_figures_are_those_of_the_table_of_chips(each):
    chip = devices.find_chip(each.kind)
    assert chip is not None and chip.name == f"TPU {each.name}"
    assert (each.bandwidth, each.bf16_rate, each.int8_rate) == (chip.bandwidth, chip.bf16_rate, chip.int8_rate)
    assert generations.find(each.kind) is generations.find(chip.name) is each


def test_what_is_no_known_tpu():
    assert generations.find("NVIDIA V620") is None
    assert generations.find("TPU v4") is None
    assert generations.find("cpu") is None


def test_clocks_are_those_of_such_chips():
    assert {name: round(each.clock / 1e9, 2) for name, each in generations.BY_NAME.items()} == {
        "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "7x": 2.2
    }  # fmt: skip
