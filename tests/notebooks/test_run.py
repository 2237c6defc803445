"""The notebooks run: in the suite two of them, one with the small draft model and one sequence at once, so that little is compiled; in `ci`
all as they are (one has no engine: it ran so in the suite)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SMALL_ENGINES = """
from dataclasses import replace
from jaxinfer import api
from jaxinfer.config import SchedulerConfig
Engine, small = api.Engine, SchedulerConfig(max_sequences=1, max_step_tokens=16)
api.Engine = lambda config, **rest: Engine(replace(config, scheduler=small, model=replace(config.model, model={draft!r})), **rest)
"""


def run(notebook, **environment):
    flags = ["-n0", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=600", "-o", "timeout=900"]
    command = [sys.executable, "-m", "pytest", *flags, notebook]
    done = subprocess.run(command, cwd=FOLDER, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


LONGER = ("01_generate", "02_a_kernel_by_hand", "05_speculation")
ALL = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("notebook", [path for path in ALL if path.stem not in LONGER], ids=lambda path: path.stem)
def test_with_small_engines(notebook, tmp_path):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "small_engines.py").write_text(SMALL_ENGINES.format(draft=str(FOLDER.parent / "checkpoints" / "draft")))
    run(notebook, IPYTHONDIR=str(tmp_path))


@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", [path for path in ALL if path.stem != "03_plan_a_slice"], ids=lambda path: path.stem)
def test_as_it_is(notebook):
    run(notebook)
