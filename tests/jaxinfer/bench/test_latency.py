"""The latency benchmark over an echoing engine that has the program of a tiny model. No times are judged."""

import argparse
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import ceilings, latency
from jaxinfer.bench.latency import Load
from jaxinfer.cache.kv import PoolShape
from jaxinfer.config import EngineConfig
from jaxinfer.engine import engine as engine_module
from jaxinfer.models import llama
from jaxinfer.models.graph import Graph
from pallas_kernels import device_clock
from pallas_kernels.device_clock import Span
from tests.fakes import FakeEngine, FakeInfo


class Engine(FakeEngine):
    """An echo with the parts that the benchmark reads."""

    made: ClassVar[list[EngineConfig]] = []

    def __init__(self, config=None, *, progress=None):
        super().__init__(info=FakeInfo(max_model_len=256, kv_tokens=1024))
        graph = Graph.of(llama, llama.TINY, "float32")
        pool = PoolShape(pages=33, page_size=32)
        specs = graph.kv_specs(33, 32)
        sizes = SimpleNamespace(graph=graph, pool=pool, kv_specs=specs, max_sequences=4)
        self.drew = []
        draw = lambda name: lambda computed, demand: self.drew.append(name)
        self.program = SimpleNamespace(config=sizes, forward=lambda packed: packed, sample=draw("sampled"), verify=draw("verified"))
        self.last_packed = packed_of(1)
        self.made.append(config)

    @property
    def scheduler(self):
        return SimpleNamespace(waiting=0, running=self.running)


def packed_of(decode_tokens):
    return SimpleNamespace(shapes=SimpleNamespace(bucket=SimpleNamespace(decode_tokens=decode_tokens)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(engine_module, "Engine", Engine)
    monkeypatch.setattr(ceilings, "measure", lambda dtype: ceilings.Ceilings(1e9, 1e12, str(dtype)))


def run(capsys, *arguments):
    code = program.main(["bench", "latency", "--json", "--repeat", "2", "--steps", "4", *arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_rows(capsys):
    code, rows, err = run(capsys, "--decode", "2x20", "--decode", "8x20", "--decode", "1x250", "--prefill", "3x30")
    assert code == 0 and [(row["row"], row.get("load")) for row in rows] == [("ceiling", None), ("decode", "2x20"), ("prefill", "3x30")]
    assert err.count("is left out: the engine holds 4 x 256 tokens, 1024 in all") == 2
    decode = rows[1]
    assert decode["context"] == 20 + 1 + 4 + 6 - 1 and len(decode["runs"]) == 2 and decode["milliseconds"] > 0
    assert decode["device_milliseconds"] > 0 and 0 <= decode["host_gap_share"] < 1
    assert 0 < rows[2]["launch_milliseconds"] <= rows[2]["milliseconds"]
    assert decode["share_of_floor"] == pytest.approx(decode["floor_milliseconds"] / decode["milliseconds"])


def test_kernels_stand_behind_their_rows(capsys, monkeypatch):
    """The two longest of three; a decode step is one of eight that were profiled."""
    ran = []

    def spans_of(run):
        run()
        ran.append(run)
        return [Span(0, 8_000, "gemm_1"), Span(0, 16_000, "norm"), Span(0, 8_000, "gemm_2"), Span(0, 800, "copy")]

    monkeypatch.setattr(device_clock, "spans_of", spans_of)
    _, rows, _ = run(capsys, "--decode", "2x20", "--prefill", "3x30", "--kernels", "2")
    assert [row["row"] for row in rows] == ["ceiling", "decode", "kernel", "kernel", "prefill", "kernel", "kernel"] and len(ran) == 2
    decode, prefill = rows[2:4], rows[5:]
    assert {row["kernel"] for row in decode} == {"gemm", "norm"} and all(row["load"] == "2x20" for row in decode)
    gemm, whole = (next(row for row in part if row["kernel"] == "gemm") for part in (decode, prefill))
    assert (gemm["count"], gemm["microseconds"]) == (0.25, pytest.approx(2))
    assert (whole["count"], whole["microseconds"]) == (2, pytest.approx(16))
    assert gemm["share"] == pytest.approx(16 / 32.8)


def test_kernels_that_nobody_knows_of_are_said_to_be_missing(capsys, monkeypatch):
    monkeypatch.setattr(device_clock, "spans_of", lambda run: [])
    _, rows, err = run(capsys, "--decode", "1x20", "--kernels", "2")
    assert [row["row"] for row in rows] == ["ceiling", "decode"] and "NVIDIA GPU with CUPTI" in err


@pytest.mark.parametrize(("width", "name"), [(1, "sampled"), (3, "verified")])
def test_a_step_with_drafts_is_launched_as_it_ran(width, name):
    engine = Engine()
    engine.last_packed = packed_of(width)
    assert latency._device_seconds(engine, 2) > 0 and engine.drew == [name] * 3


def test_what_lies_beside_the_model_is_in_no_floor():
    engine = Engine()
    config = engine.program.config
    alone = latency._kv_bytes(engine)
    config.kv_specs = (*config.kv_specs, *config.kv_specs)
    assert latency._kv_bytes(engine) == alone


def test_floors_are_arithmetic():
    engine = Engine()
    sizes = {name: spec.nbytes for name, spec in zip(engine.program.config.graph.names, engine.program.config.graph.specs, strict=True)}
    assert "lm_head.weight" in sizes
    assert latency._weights_read(engine, 3) == sum(sizes.values()) - sizes["embedding.weight"]
    assert latency._kv_bytes(engine) == 2 * 2 * 2 * 16 * 4  # layers, k and v, heads, head_dim, bytes
    layer = 64 * 64 * 2 + 2 * 64 * 2 * 16 + 3 * 64 * 96
    assert latency._prefill_operations(engine, Load(3, 10)) == 3 * (2 * 2 * layer * 10 + 2 * 2 * 4 * 16 * 100)


def test_a_shape_is_random_weights_and_just_enough_context(capsys):
    run(capsys, "--shape", "llama-3.1-8b", "--decode", "1x20")
    model = Engine.made[-1].model
    assert (model.model, model.load_format, model.max_model_len) == ("llama-3.1-8b", "random", 20 + 1 + 4 * 4)
    run(capsys, "--shape", "llama-3.1-8b", "--decode", "1x20", "--max-model-len", "128")
    assert Engine.made[-1].model.max_model_len == 128


def test_a_sequence_that_ends_early_is_an_error(monkeypatch):
    engine = Engine()
    engine.info = FakeInfo(max_model_len=24, kv_tokens=1024)
    with pytest.raises(RuntimeError, match="did not decode in every step"):
        latency.time_decode(engine, Load(1, 20), argparse.Namespace(steps=4, repeat=1), ceilings.Ceilings(1, 1, ""))


def test_no_run_finds_what_another_computed():
    engine, ceiling = Engine(), ceilings.Ceilings(1, 1, "")
    latency._prefill(engine, Load(2, 20), argparse.Namespace(repeat=2), ceiling)
    latency.time_decode(engine, Load(2, 20), argparse.Namespace(steps=4, repeat=1), ceiling)
    salts = [request.cache_salt for request in engine.seen]
    assert len(salts) == 8 and salts[::2] == salts[1::2] and len(set(salts)) == 4
    assert engine.seen[0].prompt == engine.seen[2].prompt


@pytest.mark.parametrize("text", ["16", "x", "0x5", "ax5"])
def test_a_bad_load_says_what_to_write(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write for example 16x600"):
        latency.parse_load(text)
