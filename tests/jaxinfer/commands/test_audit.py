"""`jaxinfer audit NAME` finds audits in their folder."""

import subprocess
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.audit import quant
from jaxinfer.bench.rows import stamp
from jaxinfer.commands import audit
from jaxinfer.quant import find


def test_audits_are_found_and_can_run():
    found = audit.audits()
    assert "quant" in found and not audit.HELPERS & set(found)
    assert all(module.HELP and callable(module.run) for module in found.values())


def test_the_named_one_runs_and_gets_the_stamp(monkeypatch):
    monkeypatch.setattr(quant, "run", lambda args, given: 1 if given is stamp and args.max_kl == 0.5 else 0)
    assert program.main(["audit", "quant", "--data", "x", "--max-kl", "0.5"]) == 1


def test_help_lists_every_scheme(capsys):
    with pytest.raises(SystemExit):
        program.main(["audit", "quant", "--help"])
    assert all(scheme in capsys.readouterr().out for scheme in find.schemes()[:1])


def test_flags_are_read_before_jax_is_there():
    code = "import sys; from jaxinfer.commands import audit; audit.audits(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
