"""The notebooks run on the embedded model. Here their engines hold one sequence, so that little is compiled; `ci` runs them as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SMALL_ENGINES = """
from dataclasses import replace
from jaxinfer import config
from jaxinfer.api import LLM
build, small = LLM.build.__func__, config.SchedulerConfig(max_sequences=1, max_step_tokens=16)
LLM.build = classmethod(lambda cls, config, **rest: build(cls, replace(config, scheduler=small), **rest))
"""


def run(notebook, **environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=600", "-o", "timeout=900", notebook]
    done = subprocess.run(command, cwd=FOLDER, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_with_small_engines(notebook, tmp_path):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "small_engines.py").write_text(SMALL_ENGINES)
    run(notebook, IPYTHONDIR=str(tmp_path))


@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_as_it_is(notebook):
    run(notebook)
