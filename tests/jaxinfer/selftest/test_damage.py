"""Damage is done by the seed alone, and to folders that exist."""

import random

import pytest

from jaxinfer.checkpoint.convert import convert
from jaxinfer.models.graph import Quantization
from jaxinfer.selftest import damage, foreign, r13
from tests.quantised_files import tiny_model
from tests.weight_files import read_all


def test_every_case_has_a_name_of_its_own_and_kinds_that_are_built():
    built = {*foreign.CONFIGS, "sharded", "orbax", *r13.SCHEMES, *(f"{name}+" for name in r13.SCHEMES)}
    assert len({case.name for case in damage.CASES}) == len(damage.CASES)
    assert all(case.kinds and set(case.kinds) <= built for case in damage.CASES)
    assert {kind for case in damage.CASES for kind in case.kinds} == built


@pytest.mark.parametrize("name", ["bit of the weights", "weights truncated", "tensor missing", "bad scale", "bits of a group"])
def test_the_same_seed_does_the_same_damage(name, tmp_path):
    model, case, left = tiny_model(tmp_path / "model"), next(it for it in damage.CASES if it.name == name), []
    for number in range(2):
        folder = tmp_path / str(number)
        convert(model, folder, Quantization.parse("int8"))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        changed = case.damage(folder, random.Random(8))
        left.append((changed, {path.name: path.read_bytes() for path in folder.iterdir()}))
        assert left[-1][1] != before
    assert left[0] == left[1]


def test_one_tensor_is_changed_and_no_other(tmp_path):
    path = tiny_model(tmp_path / "model") / "model.safetensors"
    before = read_all(path)
    assert damage.rewrite(path, lambda tensors: tensors.pop("lm_head.weight") is None or "lm_head.weight") == "lm_head.weight"
    after = read_all(path)
    assert set(before) - set(after) == {"lm_head.weight"}
    assert all(values.tobytes() == before[name].tobytes() for name, values in after.items())
