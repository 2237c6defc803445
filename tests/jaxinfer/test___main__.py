"""The command line: finding commands, answering before jax is there, ending in good order."""

import subprocess
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.commands import models
from jaxinfer.config import ConfigError

ALL_HELP = """
import contextlib, io, sys
from jaxinfer.__main__ import command_names, main
from jaxinfer.commands.bench import benchmarks
for arguments in [[], ["--help"], *([name, "--help"] for name in command_names()), *(["bench", name, "--help"] for name in benchmarks())]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    assert code == (0 if arguments else 2), arguments
    assert "usage: jaxinfer" in out.getvalue() + err.getvalue(), arguments
    assert "jax" not in sys.modules and "fastapi" not in sys.modules and "rich" not in sys.modules, arguments
"""

CLOSED_PIPE = """
import sys
from jaxinfer import __main__ as program
from jaxinfer.commands import models
models.run = lambda args: print("x" * 1000000) or 0
sys.exit(program.main(["models"]))
"""


def run_with(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(models, "run", run)
    return program.main(["models"])


def test_commands_are_found_in_the_folder():
    assert {"bench", "chat", "doctor", "generate", "models", "serve"} <= set(program.command_names())


def test_every_help_is_answered_before_jax_is_imported():
    subprocess.run([sys.executable, "-c", ALL_HELP], check=True)


def test_run_as_a_module():
    found = subprocess.run([sys.executable, "-m", "jaxinfer", "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"jaxinfer {program.jaxinfer.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "unknown command 'genrate' (did you mean 'generate'?); `jaxinfer --help` lists the commands"),
        (["zzz"], "unknown command 'zzz'; `jaxinfer --help` lists the commands"),
        (["--fast", "models"], "unknown flag '--fast' before the command; `jaxinfer --help` lists the commands"),
        (
            ["generate", "--max-tokns=3"],
            "generate does not know '--max-tokns=3' (did you mean '--max-tokens'?); see `jaxinfer generate --help`",
        ),
        (["generate", "--prompt", "x", "--temperature", "900"], "temperature must be between 0 and 100, got 900"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(capsys, arguments, message):
    assert program.main(arguments) == 2
    assert capsys.readouterr() == ("", f"jaxinfer: error: {message}\n")


def test_our_own_errors_are_one_line(monkeypatch, capsys):
    assert run_with(monkeypatch, ConfigError("the mesh is too large")) == 2
    assert capsys.readouterr() == ("", "jaxinfer: error: the mesh is too large\n")


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "\n")


def test_a_bug_shows_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, ZeroDivisionError())


def test_a_closed_pipe_is_quiet():
    command = subprocess.Popen([sys.executable, "-c", CLOSED_PIPE], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait() == 141


def test_code_of_the_command_is_returned(monkeypatch):
    monkeypatch.setattr(models, "run", lambda args: 1)
    assert program.main(["models"]) == 1
