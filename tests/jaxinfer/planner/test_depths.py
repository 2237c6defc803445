"""Two small depths tell of the whole: what is compiled, at which depths, and what follows for every layer."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxinfer.config import EngineConfig, MeshShape, from_arguments
from jaxinfer.planner import child, depths
from jaxinfer.planner.collectives import Collective
from jaxinfer.planner.depths import Depths, compile_for, depths_of, shallower
from jaxinfer.planner.estimate import Choice, Wish
from jaxinfer.planner.slices import parse
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.program import Program
from jaxinfer.step.sizes import ProgramSize
from tests.jaxinfer.conftest import CONFIG
from tests.jaxinfer.planner.conftest import ENGINE, request

DEEP = {**CONFIG, "num_hidden_layers": 32}


def choice(values=DEEP, **changed):
    wish = Wish(dict(values), from_arguments(EngineConfig, {**ENGINE, "max_sequences": 4}), 64, 16, 4, "throughput", None)
    return Choice(parse("cpu-1"), MeshShape(1, 1), replace(wish, **changed), tuple(jax.devices()[:1]))


def layers_of(program):
    return len(program.config.graph.config.attention_shapes)


@pytest.fixture
def compiled(monkeypatch):
    """Programs that say what a compiler would: 7 bytes of code a layer beside 100, temporaries of 50 whatever the depth."""
    calls = []

    def compile(self, progress, keys=None):
        calls.append((layers_of(self), list(keys)))
        self._compiled = dict.fromkeys(keys)
        self.compile_seconds = dict.fromkeys(map(str, keys), 1.5)
        progress("compile", 0, len(keys))
        for number in range(len(keys)):
            progress("compile", number + 1, len(keys))

    def sizes(self):
        return {key: ProgramSize(50, 3, 100 + 7 * layers_of(self) * isinstance(key, Bucket)) for key in self._compiled}

    monkeypatch.setattr(Program, "compile", compile)
    monkeypatch.setattr(Program, "sizes", property(sizes))
    sums = lambda self: {key: (Collective("all-reduce", 64, 1 + 2 * layers_of(self)),) for key in self._compiled if isinstance(key, Bucket)}
    monkeypatch.setattr(depths, "texts", sums)
    return calls


def test_forward_passes_are_compiled_at_two_depths_and_the_rest_once(compiled):
    seen = []
    made = compile_for(choice(), 16, everything=False, progress=lambda *report: seen.append(report))
    assert made.depths == Depths(2, 4) and sorted(layers for layers, _ in compiled) == [2, 4, 32]
    assert all(isinstance(key, Bucket) == (layers < 32) for layers, keys in compiled for key in keys)
    assert set(made.sizes) == set(made.program.config.largest) and layers_of(made.program) == 32
    forward, sampler = (next(size for key, size in made.sizes.items() if isinstance(key, Bucket) == deep) for deep in (True, False))
    assert forward == ProgramSize(50, 3, 100 + 7 * 32) and sampler == ProgramSize(50, 3, 100)
    assert {each for found in made.collectives.values() for each in found} == {Collective("all-reduce", 64, 1 + 2 * 32)}
    assert made.each[str(made.program.config.largest[0])] == 3.0 and made.needed > 0
    assert seen == [("compile", number, 6) for number in range(7)]


def test_all_of_them_in_full(compiled):
    made = compile_for(choice(), 16, everything=True, progress=lambda *_: None)
    assert made.depths is None and [layers for layers, _ in compiled] == [32] and set(made.sizes) == set(made.program.config.keys)


@pytest.mark.parametrize(("changed", "expected"), [
    ({"values": CONFIG}, None), ({"values": {**CONFIG, "num_hidden_layers": 15}}, None),
    ({"values": {**CONFIG, "num_hidden_layers": 16}}, Depths(2, 4)),
    ({"values": {**DEEP, "layer_types": (["local"] * 3 + ["global"]) * 8}}, Depths(4, 8)),
    ({"values": {**DEEP, "layer_types": (["local"] * 5 + ["global"]) * 5 + ["local"] * 2}}, None), ({"folder": "somewhere"}, None),
])  # fmt: skip
def test_depths_are_whole_patterns_of_models_that_are_much_deeper(changed, expected):
    made = choice()
    wish, layers = replace(made.wish, **changed), int(changed.get("values", DEEP)["num_hidden_layers"])
    shapes = SimpleNamespace(attention_shapes=("heads",) * layers)
    program = SimpleNamespace(config=SimpleNamespace(graph=SimpleNamespace(config=shapes)))
    assert depths_of(replace(made, wish=wish), program) == expected


def test_a_line_never_goes_below_what_was_seen():
    assert Depths(2, 4).line(10, 14, 32) == 14 + 2 * 28 and Depths(2, 4).line(10, 9, 32) == 10


def test_lists_with_an_entry_for_each_layer_are_cut():
    cut = shallower({"num_hidden_layers": 4, "layer_types": list("abab"), "other": [1, 2], "hidden_size": 8}, 2)
    assert cut == {"num_hidden_layers": 2, "layer_types": ["a", "b"], "other": [1, 2], "hidden_size": 8}


@pytest.mark.ci
def test_the_line_meets_the_whole():
    """Of real programs of a deeper model: all of its layers compiled, and two depths of them."""
    values = {**CONFIG, "num_hidden_layers": 16}
    plans = [child.planned(request("cpu-1", values=values, compile=True, all=all), lambda *_: None) for all in (False, True)]
    assert [plan.programs["layers"] for plan in plans] == [[2, 4], None]
    assert plans[0].memory["programs"] == pytest.approx(plans[1].memory["programs"], rel=0.03)
