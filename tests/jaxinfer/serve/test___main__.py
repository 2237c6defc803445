"""`python -m jaxinfer.serve` is `jaxinfer serve`, and reads its flags before anything heavy is imported."""

import subprocess
import sys

IMPORTED = """
import runpy, sys
sys.argv = ["serve", "--help"]
try:
    runpy.run_module("jaxinfer.serve", run_name="__main__")
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy():
    done = run("-c", IMPORTED)
    code, *imported = done.stderr.split()
    assert code == "0"
    assert "--api-key" in done.stdout
    assert "--mesh" in done.stdout
    assert "jaxinfer.commands.serve" in imported
    assert not set(imported) & {"jax", "numpy", "fastapi", "uvicorn", "pydantic", "tokenizers"}


def test_a_misspelt_flag_is_told_with_the_nearest():
    done = run("-m", "jaxinfer.serve", "--prot", "80")
    assert done.returncode == 2
    assert "--port" in done.stderr
    assert done.stdout == ""
