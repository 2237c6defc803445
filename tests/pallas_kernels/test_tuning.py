import dataclasses
import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import dispatch, modelling, timing, tuning
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.cases import TUNING, Case

KEY = {"kv_heads": 2, "heads": 6, "head_dim": 64, "dtype": "float32"}
ROW = tuning.Row("flash_attention", "xla", KEY, {"queries": 8, "keys": 16}, "Some Chip 9", "0.0", "2026-01-01", 12.5)
TARGET = dispatch.Target("gpu", "Some Chip 9")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, and tables that were not read yet."""
    monkeypatch.setattr(tuning, "user_folder", lambda: tmp_path)
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def test_a_measured_row_wins(own_folder):
    tuning.write(tuning.table_file(own_folder, TARGET.device, "flash_attention"), [ROW])
    assert tuning.sizes("flash_attention", "xla", TARGET, KEY) == {"queries": 8, "keys": 16}
    assert tuning.sizes("flash_attention", "xla", TARGET, KEY | {"head_dim": 128}) != {"queries": 8, "keys": 16}


def test_a_modelled_row_is_found_by_generation_and_a_measured_one_wins(own_folder):
    changes = {"device": "TPU v6 lite", "implementation": "tpu", "source": tuning.MODELLED, "microseconds": 1.0, "compiler": "libtpu 0"}
    row = dataclasses.replace(ROW, **changes)
    tuning.write(tuning.table_file(own_folder, row.device, row.op), [row])
    for device in ("TPU v6 lite", "TPU v6e"):
        assert tuning.sizes("flash_attention", "tpu", dispatch.Target("tpu", device), KEY) == row.sizes
    assert tuning.sizes("flash_attention", "tpu", dispatch.Target("tpu", "TPU v5"), KEY) != row.sizes
    measured = dataclasses.replace(row, source=tuning.MEASURED, microseconds=99.0, sizes={"lines": 16})
    tuning.write(tuning.table_file(own_folder, row.device, row.op), [measured])
    tuning.table.cache_clear()
    assert tuning.sizes("flash_attention", "tpu", dispatch.Target("tpu", "TPU v6e"), KEY) == {"lines": 16}


def test_a_row_says_whether_it_was_measured():
    with pytest.raises(ValueError, match="source of a row is 'measured' or 'modelled', not 'guessed'"):
        dataclasses.replace(ROW, source="guessed")


def test_then_the_heuristic():
    from pallas_kernels.flash_attention import xla

    assert tuning.sizes("flash_attention", "xla", TARGET, KEY) == xla.heuristic("gpu", KEY)


def test_then_an_error(monkeypatch):
    monkeypatch.setattr(tuning, "_module", lambda op, name: SimpleNamespace(heuristic=lambda platform, key: None))
    with pytest.raises(NotImplementedError, match=r"no block sizes.*Some Chip 9.*--op flash_attention --implementation xla"):
        tuning.sizes("flash_attention", "xla", TARGET, KEY)


def test_forced_sizes_hold_inside_only():
    with tuning.forced({"queries": 1, "keys": 1}):
        assert tuning.sizes("flash_attention", "xla", TARGET, KEY) == {"queries": 1, "keys": 1}
    assert tuning.sizes("flash_attention", "xla", TARGET, KEY) != {"queries": 1, "keys": 1}


def test_write_replaces_rows_of_the_same_key(own_folder):
    file = own_folder / "rows.json"
    other = dataclasses.replace(ROW, key=KEY | {"head_dim": 128})
    tuning.write(file, [ROW, other])
    tuning.write(file, [dataclasses.replace(ROW, microseconds=1.0)])
    assert sorted(row.microseconds for row in tuning.read(file)) == [1.0, 12.5]


@pytest.mark.parametrize("text", ["nonsense", '[{"op": "x"}]', "[1]"])
def test_a_damaged_table_is_refused(own_folder, text):
    file = tuning.table_file(own_folder, TARGET.device, "flash_attention")
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match="does not hold rows of block sizes"):
        tuning.sizes("flash_attention", "xla", TARGET, KEY)


def test_packaged_rows_are_whole():
    """Every row that ships names an implementation and what it was measured with, or compiled with where no chip was there."""
    for file in tuning.SHIPPED.glob("*/*.json"):
        for row in tuning.read(file):
            assert bool(row.compiler) == (row.source == tuning.MODELLED)
            assert file == tuning.table_file(file.parent.parent, row.device, row.op)
            assert row.implementation in dispatch.implementations(row.op)
            assert row.date
            assert row.jax
            assert row.microseconds > 0


def test_the_fastest_candidate_of_a_key_is_kept():
    cases = [SimpleNamespace(name=name, tuning_key=lambda: KEY) for name in ("a", "b")]
    asked = []

    def measure(case, implementation, sizes):
        asked.append((case.name, implementation))
        return float(abs(sizes["queries"] - 256) + abs(sizes["keys"] - 256)) + 1.0

    (row,) = tuning.tune("flash_attention", "xla", cases, measure)
    assert row.sizes == {"queries": 256, "keys": 256}
    assert row.microseconds == 2.0
    assert row.key == KEY
    assert row.device == dispatch.target().device
    assert set(asked) == {("a", "xla"), ("b", "xla")}


def test_what_an_implementation_refuses_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "refusal", lambda op, name, target, key: "too warm" if key["heads"] == 7 else None)
    cases = [SimpleNamespace(name="x", tuning_key=lambda heads=heads: KEY | {"heads": heads}) for heads in (6, 7)]
    (row,) = tuning.tune("flash_attention", "xla", cases, lambda case, implementation, sizes: 1.0)
    assert row.key["heads"] == 6
    assert "left out, too warm" in capsys.readouterr().out


def test_measure_runs_a_case():
    assert tuning.measure(Case("tiny", tokens=1, features=8, outputs=8), "xla", {"outputs": 4}) > 0


def test_the_command_writes_a_table(own_folder, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "tune", lambda op, implementation, cases: [dataclasses.replace(ROW, key={"cases": len(cases)})])
    tuning.main(["--op", "flash_attention", "--case", "demo_1k"])
    file = tuning.table_file(own_folder, dispatch.target().device, "flash_attention")
    assert json.loads(file.read_text())[0]["key"] == {"cases": 1}
    assert str(file) in capsys.readouterr().out


def test_a_case_of_the_benchmark_can_be_tuned_by_its_name(own_folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tuning, "tune", lambda op, implementation, cases: asked.append([case.name for case in cases]) or [])
    monkeypatch.setattr(dispatch, "choose", lambda op, implementation, target: "gpu")
    long = ["--case", "decode_64x4096_int8"]
    for words in ([], [*long, "--out", str(own_folder / "long.json")]):
        tuning.main(["--op", "paged_attention", *words])
    for words in ([], ["--for", "v5e"]):
        with pytest.raises(SystemExit):  # they would go where all steps of that key look
            tuning.main(["--op", "paged_attention", *long, *words])
        assert "say with --out where they are to go" in capsys.readouterr().err
    assert asked[0][0] == "demo_decode" and "decode_64x4096_int8" not in asked[0] and asked[1] == ["decode_64x4096_int8"]


def test_what_was_measured_is_kept_when_the_rest_fails(own_folder, monkeypatch):
    def tune(op, implementation, cases):
        yield ROW
        raise RuntimeError("no memory left")

    monkeypatch.setattr(tuning, "tune", tune)
    with pytest.raises(RuntimeError, match="no memory left"):
        tuning.main(["--op", "flash_attention", "--case", "demo_1k", "--out", str(own_folder / "rows.json")])
    assert tuning.read(own_folder / "rows.json") == (ROW,)


def test_the_command_models_chips_that_are_not_there(own_folder, monkeypatch, capsys):
    made = [dataclasses.replace(ROW, device=device, source=tuning.MODELLED, compiler="libtpu 0") for device in ("TPU v5", "TPU7x")]
    monkeypatch.setattr(modelling, "rows", lambda op, cases, chips: iter(made) if [chip.name for chip in chips] == ["v5p", "7x"] else None)
    tuning.main(["--op", "flash_attention", "--for", "v5p,7x", "--out", str(own_folder / "here")])
    assert [tuning.read(own_folder / "here" / name / "flash_attention.json") for name in ("tpu-v5", "tpu7x")] == [(row,) for row in made]
    assert "12.5 us predicted, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "invalid choice"),
        (["--op", "flash_attention", "--case", "nope"], "no tuning case nope; there are demo_1k"),
        (["--op", "flash_attention", "--implementation", "cuda"], "unknown implementation"),
        (["--op", "quantized_matmul", "--implementation", "reference"], "no block sizes to tune"),
        (["--op", "flash_attention", "--for", "v5e,v4"], "no generation v4; there are v5e, v5p, v6e, 7x"),
        (["--op", "flash_attention", "--for", "v5e", "--implementation", "xla"], "--for models the 'tpu' implementation, not 'xla'"),
        (["--op", "dense_matmul", "--for", "v5e"], "'tpu' does not exist for dense_matmul"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tuning.main(arguments)
    assert message in capsys.readouterr().err


def test_sizes_reach_the_ops_when_the_module_runs_as_a_command(own_folder, monkeypatch):
    """Then there are two copies of it, of which ops know one."""
    wanted = xla.candidates("cpu", TUNING[0].tuning_key())
    met = []

    def measure(case, run, make, settings):
        jax.eval_shape(run, make(0))
        return SimpleNamespace(typical=1e-6)

    def meet(op, implementation, target, key, real=tuning.sizes):
        met.append(real(op, implementation, target, key))
        return met[-1]

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(tuning, "sizes", meet)
    words = ["--op", "quantized_matmul", "--implementation", "xla", "--case", "demo_one", "--out", str(own_folder / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["tuning", *words])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("pallas_kernels.tuning", run_name="__main__")
    assert len(wanted) > 1 and met == wanted


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "pallas_kernels.tuning", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--op" in done.stdout
