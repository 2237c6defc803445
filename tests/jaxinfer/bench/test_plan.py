"""The planner's check over an echoing engine that has the program of a tiny model; the plan is made up. No times are judged."""

import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import ceilings, plan
from jaxinfer.engine import engine as engine_module
from jaxinfer.models.layers import Placement
from jaxinfer.planner import planning
from jaxinfer.planner.outcome import Plan
from jaxinfer.sharding import make_mesh
from jaxinfer.step.buckets import Bucket
from tests.fakes import FakeInfo
from tests.jaxinfer.bench import test_latency
from tests.jaxinfer.conftest import CONFIG

GIVEN = ("--model", "draft", "--decode", "2x20", "--decode", "9x20", "--steps", "4", "--repeat", "1")


class Engine(test_latency.Engine):
    """As the one of the latency benchmark, with a bucket."""

    def __init__(self, config=None, *, progress=None):
        super().__init__(config, progress=progress)
        self.program.config.__dict__.update(buckets=(Bucket(32, 4, 4),), placement=Placement(make_mesh({})))
        self.info = FakeInfo(max_model_len=256, kv_tokens=1000, weight_bytes=100, program_bytes=200, kv_bytes=300, device="cpu")


@pytest.fixture
def asked(monkeypatch):
    """What the planner is asked for; it answers with 102 bytes of weights and 207 of programs."""
    calls = []

    def run(model, slice, wanted, settings, progress=None):
        calls.append((model, slice, wanted, settings))
        chosen = {"attention": "xla", "matmul": "xla", "weights": settings.get("quantize", "float32")}
        memory = {"weights": 102, "programs": 207, "slots": 5, "kv_pool": 300, "kv_token": 64.0}
        return Plan(model, {"slice": slice}, chosen, fits=True, memory=memory, capacity={"kv_tokens": 1000})

    monkeypatch.setattr(planning, "run", run)
    monkeypatch.setattr(engine_module, "Engine", Engine)
    monkeypatch.setattr(ceilings, "measure", lambda dtype: ceilings.Ceilings(1e9, 1e12, str(dtype)))
    return calls


def run(capsys, *flags):
    code = program.main(["bench", "plan", "--json", *GIVEN, *flags])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_rows_say_how_far_off_a_prediction_is(asked, capsys):
    code, rows, err = run(capsys)
    found = {row["row"]: (row["ratio"], row["within"]) for row in rows if row["weights"] == "none"}
    assert found.pop("decode 2x20 ms")[1] is None and "9x20 is left out" in err
    assert found == {
        "weights, bytes a device": (1.02, True), "programs, bytes a device": (1.035, False), "KV pool, bytes a device": (1.0, True),
        "weights, programs and KV pool, bytes a device": (1.015, True),
        "KV tokens": (1.0, True),
    }  # fmt: skip
    assert code == 1 and len(rows) == 12 and rows[-1]["weights"] == "int8" and rows[-1]["predicted"] > 0


def test_the_plan_is_for_this_machine_and_the_engines_settings(asked, capsys):
    run(capsys, "--schemes", "int8", "--page-size", "64", "--mesh", "tensor=2")
    (model, slice, wanted, settings), = asked
    assert (model, slice, settings) == ("draft", "cpu-2", {"page_size": 64, "quantize": "int8"})
    assert (wanted.context, wanted.mesh, wanted.compile, wanted.all) == (20 + 9 + 4 * 3, (1, 2), True, False)
    made = Engine.made[-1]
    assert (made.model.max_model_len, made.model.quantize, made.cache.page_size) == (41, "int8", 64)


def test_contexts_are_no_longer_than_the_architecture_allows(asked, capsys, monkeypatch):
    inner = {name: value for name, value in CONFIG.items() if name != "max_position_embeddings"}
    monkeypatch.setattr(planning, "read_shape", lambda model, revision: {"model_type": "gemma3", "text_config": inner})
    run(capsys, "--schemes", "none", "--decode", "1x9000")
    assert asked[0][2].context == 9000 + 1 + 4 * 3


def test_what_is_in_use_is_held_against_what_lies_there(asked):
    made = planning.run("m", "h200x1", None, {})
    info = FakeInfo(kv_tokens=1000, weight_bytes=102, program_bytes=207, kv_bytes=300)
    rows = list(plan._memory(made, info, 500, chosen_there=True))
    assert {row["row"].partition(",")[0]: row["within"] for row in rows[:2]} == {"weights": True, "programs": None}
    assert rows[-1] == {"row": "in use, bytes a device", "predicted": 407, "measured": 500, "ratio": 0.814, "limit": 0.03, "within": False}
    assert plan._row("decode", 1.16, 1.0, plan.TIME)["within"] is False is not plan._row("decode", 1.14, 1.0, plan.TIME)["within"]


def test_one_kind_of_weights_is_said_with_schemes(asked, capsys):
    code, _, err = run(capsys, "--quantize", "int8")
    assert code == 2 and "write --schemes int8" in err
