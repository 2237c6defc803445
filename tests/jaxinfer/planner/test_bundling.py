"""What is written into a bundle, and when its programs are compiled anew."""

import json
from dataclasses import replace

import jax
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError
from jaxinfer.engine import setup
from jaxinfer.engine.engine import Engine
from jaxinfer.planner import bundling
from jaxinfer.step.executable import Compiler
from jaxinfer.step.program import Program
from tests.jaxinfer.conftest import settings, write_folder
from tests.jaxinfer.planner.conftest import planned


@pytest.fixture
def sizing(plain, folder):
    config = settings(folder)
    return setup._sizing(config, setup._describe(config), plain.program.config.placement)


def test_the_header_says_what_decides_the_programs(bundled, plain):
    header = json.loads((bundled / "bundle.json").read_text())
    assert header["version"] == 1 and header["model"] == "tiny" and header["devices"] == 1 and header["autotune"] is None
    assert header["machine"]["jax"] == jax.__version__ and header["machine"]["device"] == "cpu" and header["machine"]["runtime"] == {}
    assert header["programs_for"]["pages"] == 65 and header["programs_for"]["buckets"][0] == "decode1"
    assert header["settings"] == {
        "dtype": "float32", "quantize": None, "max_model_len": 64, "page_size": 4, "kv_tokens": 256, "kv_dtype": "auto", "max_sequences": 4,
        "max_step_tokens": 32, "mesh": [1, 1], "implementation": "auto", "deterministic": "off", "speculate": "off", "draft_model": None,
        "draft_tokens": 4,
    }  # fmt: skip
    assert set(header["programs"]) == {str(key) for key in plain.program.config.keys}
    entry = header["programs"]["decode4"]
    assert entry["bytes"] == (bundled / entry["file"]).stat().st_size and entry["mosaic"] is False
    manifest = json.loads((bundled / "jaxinfer_manifest.json").read_text())
    assert set(manifest["files"]) == {"bundle.json", *(entry["file"] for entry in header["programs"].values())}


def test_xlas_choices_are_kept_beside_the_programs(sizing, plain, tmp_path, monkeypatch):
    (tmp_path / "h200.textproto").write_text("version: 3")
    monkeypatch.setattr(type(plain.program.config), "keys", ("admit",))
    made = bundling.write(bundling.Order(tmp_path / "new", tmp_path / "h200.textproto", {}), sizing, plain.program)
    assert made["programs"] == 1 and made["kv_tokens"] == 256
    header = json.loads((tmp_path / "new" / "bundle.json").read_text())
    assert (tmp_path / "new" / header["autotune"]).read_text() == "version: 3"
    with pytest.raises(CheckpointError, match=r"--bundle .*new: it exists already; name another folder$"):
        bundling.write(bundling.Order(tmp_path / "new", None, {}), sizing, plain.program)


def test_choices_from_a_card(tmp_path):
    assert bundling.compiler(None, "cpu") == Compiler()
    with pytest.raises(ConfigError, match="--autotune is for slices of GPUs"):
        bundling.compiler("file", "tpu")
    with pytest.raises(ConfigError, match="no such file"):
        bundling.compiler(str(tmp_path / "file"), "gpu")
    (tmp_path / "file").touch()
    options = bundling.compiler(str(tmp_path / "file"), "gpu").options
    assert options["xla_gpu_load_autotune_results_from"] == str(tmp_path / "file") and len(options) == 2


class Refusing:
    """A traced program for which choices must be complete, and are not."""

    def __init__(self, words):
        self.words, self.asked = words, []

    def compile(self, options):
        self.asked.append(options)
        if options.get(bundling.COMPLETE):
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {self.words}")
        return "made"


@pytest.mark.parametrize(
    "words",
    [
        "Failed to get configs for: 50 out of 50 instructions. Example failure: No cached config found for HLO instr: %gemm_fusion_dot = x",
        "No cached config found for HLO instr: %gemm_fusion_dot_1 = bf16[2]",
    ],
)
def test_a_program_without_its_choices_is_refused(words):
    with pytest.raises(ConfigError, match="does not have XLA's choices"):
        bundling.Choosing({bundling.COMPLETE: True})._with_options(Refusing(words), {bundling.COMPLETE: True})


def test_a_fusion_of_one_kernel_needs_no_choice():
    lowered = Refusing("No cached config found for HLO instr: %input_reduce_fusion.4 = pred[] fusion(%x), kind=kInput")
    assert bundling.Choosing()._with_options(lowered, {bundling.COMPLETE: True, "a": "b"}) == "made"
    assert lowered.asked[-1] == {bundling.COMPLETE: False, "a": "b"}


def test_programs_are_compiled_anew_for_another_pool_only(sizing, plain, monkeypatch):
    compiled = []
    monkeypatch.setattr(Program, "compile", lambda self, progress, keys=None: compiled.append((self, keys)))
    made = plain.program
    assert bundling.complete(sizing, made, made.bytes_beside, Compiler(), print) is made and compiled == [(made, [])]
    other = sizing.program(replace(made.config.pool, pages=9))
    again = bundling.complete(sizing, other, made.bytes_beside, Compiler(), print)
    assert again is not made and compiled[-1] == (again, list(again.config.keys))
    tuned = bundling.complete(sizing, made, made.bytes_beside, Compiler({"a": "b"}), print)
    assert tuned is not made and tuned.source == Compiler({"a": "b"})


@pytest.mark.ci
def test_a_planned_bundle_starts_an_engine(tmp_path):
    folder = write_folder(tmp_path)
    plan = planned("cpu-2", mesh=[1, 2], compile=True, bundle=str(tmp_path / "made"), config={"model": str(folder)})
    wanted = f"python -m jaxinfer.serve --model {folder} --bundle {tmp_path / 'made'} --compilation-cache off"
    assert plan.fits and plan.command == wanted
    config = settings(folder)
    bare = replace(config, cache=type(config.cache)(), scheduler=type(config.scheduler)())
    engine = Engine(replace(bare, execution=replace(config.execution, bundle=str(tmp_path / "made"))))
    assert engine.info.mesh == "data=1,tensor=2" and engine.info.programs == plan.programs["bundle"]["programs"]
