"""The notebooks' tooling: what is committed is what the sources say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_notebooks_are_current():
    checked = subprocess.run([sys.executable, FOLDER / "build.py", "--check"], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, ""), "run: python notebooks/build.py"


def test_notebooks_have_a_badge_one_install_cell_and_no_outputs(build):
    for source in build.sources():
        notebook = json.loads(build.build(source))
        first, *cells = notebook["cells"]
        assert f"/github/{build.REPOSITORY}/blob/{build.BRANCH}/notebooks/{source.stem}.ipynb" in "".join(first["source"])
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert sum("pip" in cell for cell in code) == 1 and build.REPOSITORY in code[0]
        assert all(cell.get("outputs", []) == [] for cell in cells) and "{{" not in "".join(code[:2])


def test_stale_notebooks_are_written(build, monkeypatch, tmp_path, capsys):
    (tmp_path / "02_new.py").write_text("# %% [markdown]\n# Hello\n\n# %%\n1 + 1\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    for arguments, code in (["--check"], 1), ([], 0), (["--check"], 0):
        monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
        assert build.main() == code
    assert len(json.loads((tmp_path / "02_new.ipynb").read_text())["cells"]) == 3
    assert capsys.readouterr().err == "02_new.ipynb is out of date\n02_new.ipynb written\n"
