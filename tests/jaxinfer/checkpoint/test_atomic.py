"""A folder appears whole or not at all, and what killed processes leave is swept."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.checkpoint import atomic
from jaxinfer.checkpoint.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(target, text, **options):
    with atomic.new_folder(target, **options) as folder:
        assert not (target / "config.json").exists() or (target / "config.json").read_text() != text
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)
        (folder / "config.json").write_text(text)


def test_new_and_replaced(tmp_path):
    target = tmp_path / "a" / "model"
    fill(target, "one")
    assert (target / "deep" / "file").read_text() == "one" and names(target.parent) == ["model"]
    with pytest.raises(CheckpointError, match=r"it exists already; name another folder, or add --overwrite"):
        fill(target, "two")
    fill(target, "two", overwrite=True)
    assert (target / "deep" / "file").read_text() == "two" and names(target.parent) == ["model"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    fill(target, "one")
    with pytest.raises(ZeroDivisionError), atomic.new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise ZeroDivisionError
    assert (target / "config.json").read_text() == "one" and names(tmp_path) == ["model"]


def test_what_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(CheckpointError, match=r"replaces model folders only, and this one has no config\.json"):
        fill(tmp_path / "home", "x", overwrite=True)
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="expected a new or an existing folder"):
            fill(tmp_path / name, "x", overwrite=True)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "x")
    with pytest.raises(CheckpointError, match=r"--out .*file.model"):
        fill(tmp_path / "file" / "model", "x")


def test_a_system_that_cannot_swap_says_so(tmp_path, monkeypatch):
    fill(tmp_path / "model", "one")
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(CheckpointError, match=r"cannot be swapped in one step here .* name a new folder"):
        fill(tmp_path / "model", "two", overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "one" and names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_swept_and_the_living_keep_theirs(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(atomic.__file__).parents[2])!r})
from pathlib import Path
from jaxinfer.checkpoint.atomic import new_folder
with new_folder(Path({str(tmp_path / "model")!r})) as folder:
    (folder / "half").write_text("x")
    print("filling", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"filling\n"
        fill(tmp_path / "other", "x")
        atomic.sweep(tmp_path / "model")
        assert len(list(tmp_path.glob(".model.partial-*"))) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "model").exists() and len(list(tmp_path.glob(".model.partial-*"))) == 1
    fill(tmp_path / "model", "x")
    assert names(tmp_path) == ["model", "other"]
