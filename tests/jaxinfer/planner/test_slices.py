"""Names of slices: what is counted, how many devices jax shows, refusals with what there is."""

from math import prod

import pytest

from jaxinfer import devices
from jaxinfer.config import ConfigError, MeshShape
from jaxinfer.planner.slices import CUBE, EXAMPLES, FAMILIES, FLAT, of_devices, parse


@pytest.mark.parametrize(
    ("name", "chips", "shown", "topology", "platform"),
    [
        ("v5e-8", 8, 8, "2x4", "tpu"), ("v6e-4", 4, 4, "2x2", "tpu"), ("v5p-8", 4, 4, "2x2x1", "tpu"), ("tpu7x-8", 4, 8, "2x2x1", "tpu"),
        ("h100x8", 8, 8, "1x8x1", "gpu"), ("h200x1", 1, 1, "1x1x1", "gpu"), ("b200x8", 8, 8, "1x8x1", "gpu"), ("cpu-2", 2, 2, "", "cpu"),
    ],
)  # fmt: skip
def test_what_a_name_means(name, chips, shown, topology, platform):
    piece = parse(name)
    assert (piece.name, piece.chips, piece.devices, piece.topology, piece.platform) == (name, chips, shown, topology, platform)
    assert f"{chips} x" in str(piece) and f"{shown} device" in str(piece)


def test_other_spellings():
    assert parse("H200") == parse("h200x1") == parse("h200-1")
    assert parse("v5litepod-8") == parse("v5e-8")
    assert parse("cpu").devices == 1


@pytest.mark.parametrize(("name", "words"), [
    ("v5p-3", r"no such size \(v5p counts cores, 2 a chip\); there are v5p-8, v5p-16"), ("v6e-3", "there are v6e-1, v6e-4"),
    ("v6e4x", "did you mean 'v6e-4'"), ("", "write for example v5e-8"), ("a100x8", "did you mean"), ("h100x16", "h100x8"),
])  # fmt: skip
def test_what_does_not_exist_is_refused_with_what_does(name, words):
    with pytest.raises(ConfigError, match=words):
        parse(name)


def test_every_size_of_every_family_reads_back():
    for key, family in FAMILIES.items():
        for chips in family.topologies:
            piece = parse(f"{key}{family.separator}{chips * family.counted}")
            assert (piece.chips, piece.devices) == (chips, chips * family.devices)
            assert key == "cpu" or devices.find_chip(piece.chip) is not None
    assert all(prod(map(int, topology.split("x"))) == chips for table in (FLAT, CUBE) for chips, topology in table.items())
    assert all(parse(name).name == name for name in EXAMPLES.split(", "))


def test_a_compiler_is_told_of_whole_hosts():
    assert (parse("v6e-1").described, parse("v6e-4").described, parse("v5e-8").described) == ("2x2", "2x2", "2x4")


def test_every_way_to_split_the_devices():
    assert parse("v6e-4").meshes() == (MeshShape(1, 4), MeshShape(2, 2), MeshShape(4, 1))
    assert all(mesh.size == 8 for mesh in parse("tpu7x-8").meshes())


def test_devices_that_are_there_are_a_slice():
    names = [*EXAMPLES.split(", "), "cpu-2"]
    assert [of_devices(piece.chip, piece.devices).name for piece in map(parse, names)] == names
    with pytest.raises(ConfigError, match="no slice of 3 x TPU 7x is known; name one with --slice"):
        of_devices("TPU 7x", 3)


def test_larger_slices_of_the_family():
    assert [piece.name for piece in parse("h100x2").larger()] == ["h100x4", "h100x8"]
    assert parse("v5p-8").larger()[0].name == "v5p-16"


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_a_gpu_is_described_by_text(name):
    text = parse(name).target_config
    assert f'"NVIDIA {name.upper()}"' in text and text.count("{") == text.count("}")
