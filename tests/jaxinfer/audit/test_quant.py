"""The real command on a tiny model: exit codes, stdout, files, the record, and what is refused before a model is loaded."""

import json
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.audit import schemes, session
from jaxinfer.checkpoint import audit_record
from jaxinfer.config import ConfigError


def run(capsys, model, lines, *flags):
    code = program.main(["audit", "quant", "--model", str(model), "--data", str(lines), "--max-tokens", "4", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_within_the_budget(shared, model, lines, capsys, tmp_path):
    page = tmp_path / "audit.html"
    flags = ["--schemes", "int8", "--repeat", "0", "--max-kl", "1", "--json", "--html", str(page), "--record"]
    code, out, err = run(capsys, model, lines, *flags)
    found = json.loads(out)
    assert (code, found["within"], found["audit"]) == (0, True, "quant") and [config.model.quantize for config in shared] == [None, "int8"]
    assert found["data"]["documents"] == 3 and found["data"]["own"] == 2 and found["stamp"]["jax"]
    (scheme,) = found["schemes"]
    assert 0 < scheme["divergence"]["mean"]["value"] <= 1 and scheme["speed"] is None
    assert page.read_text().startswith("<!doctype html>") and "audit.json" in err
    record = json.loads((model / "audit.json").read_text())["audits"]["int8"]
    assert record["kl_mean"] == scheme["divergence"]["mean"]["value"] and record["weights"] == audit_record.fingerprint(model)
    assert record["data"] == found["data"]["sha256"]
    audit_record.require(model, "int8", "kl=1", "m")
    (model / "audit.json").unlink()


def test_over_the_budget(shared, model, lines, capsys, tmp_path):
    script = tmp_path / "score.py"
    script.write_text("import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['output']))")
    flags = ["--schemes", "int8", "--repeat", "1", "--max-kl", "0", "--metric", f"{sys.executable} {script}"]
    code, out, _ = run(capsys, model, lines, *flags)
    assert code == 1 and "verdict: over a mean KL of 0 nats per token: int8" in out
    for figure in ("KL, mean", "perplexity, ratio", "greedy tokens in common", "your metric, documents equal", "tokens/s"):
        assert figure in out
    assert not (model / "audit.json").exists()


def test_schemes_that_cannot_run_are_left_out_only_where_nobody_named_them(shared, model, lines, capsys, monkeypatch):
    opens = session.open_engine

    def opened(config):
        if config.model.quantize == "int2":
            raise ConfigError("this device cannot")
        return opens(config)

    monkeypatch.setattr(schemes, "known", lambda: ("int8", "int2"))
    monkeypatch.setattr(session, "open_engine", opened)
    code, out, err = run(capsys, model, lines, "--repeat", "0", "--max-kl", "1")
    assert code == 0 and "int2 was left out: this device cannot" in out and "int2 is left out" in err
    code, out, err = run(capsys, model, lines, "--repeat", "0", "--schemes", "int2")
    assert (code, out) == (2, "") and "--schemes int2: this device cannot" in err
    monkeypatch.setattr(schemes, "known", lambda: ("int2",))
    assert run(capsys, model, lines, "--repeat", "0")[2].endswith("no scheme can run here: int2: this device cannot\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantize", "int8"], "--quantize: the audit compares with the unquantised model"),
        (["--load-format", "random"], "made-up weights"),
        (["--mesh", "data=2"], "use tensor=2"),
        (["--require-audit", "kl=1"], "here --max-kl is the budget"),
        (["--max-kl", "-1"], "--max-kl -1"),
        (["--max-kl", "nan"], "--max-kl nan"),
        (["--repeat", "-1"], "--repeat -1 is below 0"),
        (["--metric", "no-such-program-here"], "no such program"),
        (["--schemes", "int9"], "'int9' does not exist"),
        (["--reference", "demo"], "is its own reference"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(model, lines, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(session, "open_engine", lambda config: pytest.fail("too late"))
    code, out, err = run(capsys, model, lines, *flags)
    assert (code, out) == (2, "") and said in err


def test_bad_data_is_named_by_its_line(model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert run(capsys, model, bad)[2].startswith(f"jaxinfer: error: --data {bad}, line 2: the name 'promt' means nothing here")
    bad.write_text(json.dumps({"prompt": "a" * 64}))
    assert "line 1: the prompt has 64 tokens, but the context holds 64" in run(capsys, model, bad)[2]


def test_a_quantised_checkpoint_is_compared_with_the_model_it_was_made_from(shared, model, lines, capsys, tmp_path, monkeypatch):
    """Its folder is made to look quantised: the weights are those of the int8 engine that is open."""
    stored = tmp_path / "stored"
    stored.mkdir()
    for file in model.iterdir():
        (stored / file.name).write_bytes(file.read_bytes())
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    assert "name the unquantised model it was made from with --reference" in run(capsys, stored, lines)[2]
    code, out, _ = run(capsys, stored, lines, "--reference", str(model), "--repeat", "0", "--json")
    assert code == 0 and [config.model.model for config in shared] == [str(model), str(stored)]
    assert json.loads(out)["schemes"][0]["name"] == "stored"
    assert set(json.loads((stored / "audit.json").read_text())["audits"]) == {"stored"}
