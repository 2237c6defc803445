"""`jaxinfer quantize` writes a folder that the engine starts from."""

import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.api import LLM
from jaxinfer.checkpoint import calibrate, convert, hub
from jaxinfer.checkpoint.convert import Converted
from tests.jaxinfer.conftest import settings
from tests.quantised_files import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("quantize") / "model")


def quantize(*flags):
    return program.main(["quantize", *map(str, flags)])


def test_one_line_says_what_was_made(model, tmp_path, capsys):
    assert quantize("--model", model, "--scheme", "int8,lm_head=keep", "--out", tmp_path / "out") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantised"] == 14 and found["scheme"] == "int8,lm_head=keep" and found["bytes_after"] < found["bytes_before"]
    assert (tmp_path / "out" / "jaxinfer_manifest.json").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()
    assert quantize("--model", model, "--scheme", "int8", "--out", tmp_path / "out") == 2
    assert "it exists already; name another folder, or add --overwrite" in capsys.readouterr().err


def test_flags_reach_the_converter(monkeypatch, tmp_path, capsys):
    seen = {}
    monkeypatch.setattr(hub, "resolve", lambda name, revision: seen.update(name=name, revision=revision) or tmp_path)
    monkeypatch.setattr(calibrate, "factors", lambda source, file, rules, progress: {"x": (source, file, str(rules))})
    monkeypatch.setattr(convert, "convert", lambda *given, **more: seen.update(given=given, **more) or Converted(1, 2, 3, 4))
    flags = ["--model", "owner/name", "--revision", "main", "--scheme", "w8a8", "--out", tmp_path / "o", "--format", "orbax", "--overwrite"]
    assert quantize(*flags, "--calibrate", tmp_path / "texts") == 0 and json.loads(capsys.readouterr().out)["format"] == "orbax"
    assert (seen["name"], seen["revision"], seen["kind"], seen["overwrite"]) == ("owner/name", "main", "orbax", True)
    assert seen["given"][1] == tmp_path / "o" and seen["factors"] == {"x": (tmp_path, tmp_path / "texts", "w8a8")}


def test_what_makes_no_sense(model, tmp_path, capsys):
    assert quantize("--model", model, "--scheme", "int8", "--out", tmp_path / "o", "--calibrate", "x") == 2
    assert "--calibrate is of use with w8a8 alone" in capsys.readouterr().err
    assert quantize("--model", model, "--scheme", "int7", "--out", tmp_path / "o") == 2
    assert "did you mean 'int" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.ci
@pytest.mark.parametrize(("scheme", "form"), [("int8", "safetensors"), ("int4", "orbax")])
def test_the_folder_is_served_as_the_model_quantised_at_load(scheme, form, model, tmp_path):
    assert quantize("--model", model, "--scheme", scheme, "--format", form, "--out", tmp_path / "out") == 0
    found = []
    for config in (settings(tmp_path / "out", load_format="auto"), settings(model, load_format="auto", quantize=scheme)):
        with LLM.build(config) as llm:
            found.append([it.token_ids for it in llm.generate(["abc", "x y z"], max_tokens=12, temperature=0, ignore_eos=True)])
    assert found[0] == found[1] and all(len(tokens) == 12 for tokens in found[0])
