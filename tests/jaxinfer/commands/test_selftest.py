"""`jaxinfer selftest ROW` finds rows in their folder and prints one JSON object."""

import json
import subprocess
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.commands import selftest
from jaxinfer.selftest import r2
from jaxinfer.selftest.stand import Verdict


def test_rows_are_found_in_their_order():
    found = selftest.rows()
    assert list(found)[:4] == ["R2", "R4", "R5", "R6"] and {"R16", "R24"} <= set(found)
    assert all(module.PROMISE and isinstance(module.ENGINE, bool) and callable(module.run) for module in found.values())


@pytest.mark.parametrize("passed", [True, False])
def test_one_object_says_all(passed, monkeypatch, capsys):
    monkeypatch.setattr(r2, "run", lambda args: Verdict({"steps": args.steps}, passed))
    assert program.main(["selftest", "R2", "--quick", "--seed", "7", "--steps", "5"]) == int(not passed)
    found = json.loads(capsys.readouterr().out)
    assert {"row": "R2", "promise": r2.PROMISE, "seed": 7, "quick": True, "passed": passed, "counts": {"steps": 5}}.items() <= found.items()
    assert set(found["versions"]) == {"python", "jax", "jaxinfer"} and {"seconds", "commit", "device", "date", "command"} <= set(found)


def test_flags_are_read_before_jax_is_there():
    code = "import sys; from jaxinfer.commands import selftest; selftest.rows(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
