"""A plan's numbers add up, and its words can be followed."""

import shlex
from math import prod

import pytest

from jaxinfer.config import MeshShape
from jaxinfer.planner.telling import GUESS_NOTE, HEAD_NOTE, KV_NOTE, bundle_command, name_of
from tests.jaxinfer.conftest import CONFIG
from tests.jaxinfer.planner.conftest import ENGINE, planned


def test_memory_adds_up(meshed_plan):
    memory = meshed_plan.memory
    assert memory["total"] == sum(memory[part] for part in ("weights", "slots", "programs", "kv_pool")) <= memory["limit"]
    assert memory["programs"] == sum(memory[f"programs_{part}"] for part in ("temporary", "outputs", "code"))
    assert memory["kv_token"] == 2 * 2 * 8 * 4  # keys and values of two layers, one kv head of two
    assert memory["kv_pool"] == (2 * 16 + 1) * 4 * memory["kv_token"]
    assert (memory["programs_from"], memory["lacking"]) == ("compiler", 0)


def test_the_compiled_programs_stand_there_with_their_collectives(meshed_plan):
    compiled = {row["name"]: row for row in meshed_plan.programs["compiled"]}
    assert set(compiled) == {"decode2", "decode2-prefill32x2", "sample8-full", "score-decode2-prefill32x2"}
    assert meshed_plan.programs["derived"] > 10
    sums = [each for each in compiled["decode2"]["collectives"] if each["kind"] == "all-reduce"]
    assert [(each["count"], each["bytes"]) for each in sums] == [(2 * 2 + 1, prod((2, CONFIG["hidden_size"], 4)))]


def test_target_settings_and_speed(meshed_plan):
    assert (meshed_plan.target["slice"], meshed_plan.target["devices"], meshed_plan.settings["mesh"]) == ("cpu-4", 4, "data=2,tensor=2")
    assert meshed_plan.speed["itl"] == meshed_plan.phases["decode"]["seconds"] > 0
    assert meshed_plan.speed["cost_per_million"] == pytest.approx(3.0 * 4 / 3600 / meshed_plan.speed["tokens_per_second"] * 1e6)
    assert meshed_plan.capacity["concurrency"] == 4 < 1000 < meshed_plan.capacity["largest_concurrency"]


def test_the_command_starts_what_was_planned(meshed_plan):
    wanted = "python -m jaxinfer.serve --model small --mesh data=2,tensor=2 --max-model-len 64 --max-sequences 2 --page-size 4"
    assert meshed_plan.command.startswith(wanted)


def test_the_command_has_every_setting_that_was_given():
    given = {
        "model": "my models/small", "revision": "v1", "max_sequences": 3, "kv_tokens": 512, "prefix_caching": "off", "policy": "priority",
        "load_format": "random", "deterministic": "on", "quantize": None,
    }  # fmt: skip
    words = shlex.split(planned("cpu-1", config=given).command)
    assert words[:3] == ["python", "-m", "jaxinfer.serve"]
    said = dict(zip(words[3::2], words[4::2], strict=True))
    wanted = {f"--{name.replace('_', '-')}": str(value) for name, value in {**ENGINE, **given}.items() if value is not None}
    assert said == {**wanted, "--mesh": "data=1,tensor=1", "--max-model-len": "64"}


def test_the_command_that_makes_a_bundle_again(meshed_plan):
    asked = {"model": "small", "slice": "cpu-4", "config": {"kv_tokens": 512, "quantize": None}}
    wanted = "--slice cpu-4 --mesh data=2,tensor=2 --context 64 --concurrency 4 --model small --kv-tokens 512 --bundle DIR"
    assert bundle_command(asked, meshed_plan) == f"python -m jaxinfer plan {wanted}"


def test_a_guess_is_called_one():
    plan = planned()
    assert plan.notes[0] == GUESS_NOTE and plan.memory["programs_from"] == "guess" and plan.programs["compiled"] == []
    assert [row["mesh"] for row in plan.meshes].count(plan.settings["mesh"]) == 1 and len(plan.meshes) == 3


def test_a_head_that_is_made_up_is_left_to_be_named():
    config, draft = {"speculate": "eagle"}, {"values": None, "folder": None}
    plan = planned("cpu-1", config=config, draft=draft)
    assert plan.command.endswith(" --draft-model HEAD") and HEAD_NOTE in plan.notes
    random = planned("cpu-1", config={**config, "load_format": "random"}, draft=draft)
    assert "HEAD" not in random.command and HEAD_NOTE not in random.notes


def test_quantised_keys_and_values_take_less_and_are_marked(meshed_plan):
    plan = planned(mesh=[2, 2], config={"kv_dtype": "int8"})
    assert plan.notes[1] == KV_NOTE
    assert plan.memory["kv_token"] == 2 * 2 * (8 + 4) < meshed_plan.memory["kv_token"]


def test_meshes_are_written_as_their_flag():
    assert name_of(MeshShape(2, 4)) == "data=2,tensor=4"
