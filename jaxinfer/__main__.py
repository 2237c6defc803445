"""`python -m jaxinfer COMMAND` and the console script `jaxinfer`: find the command, read its flags, run it, end in good order.

A command is a file `jaxinfer/commands/<name>.py` with `HELP`, `add_arguments(parser)` and `run(args) -> int`; the folder is
listed, nothing is registered. Flags are read before jax is imported (command modules import it inside `run`), so that `--help` and
misspelt flags are answered at once. This file does not know what any command does.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum

import jaxinfer
from jaxinfer import commands, config

OWN_PACKAGES = ("jaxinfer", "pallas_kernels")


class ExitCode(IntEnum):
    """How a command ended, for scripts."""

    OK = 0
    FAILED = 1  # it ran and found a fault (doctor, a benchmark's goal), or it broke
    USAGE = 2  # a flag, setting, checkpoint or request that cannot work: one line on stderr says which and why
    INTERRUPTED = 130  # Ctrl-C
    CLOSED = 141  # the reader of stdout went away, as in `| head`


EPILOG = "exit codes: 0 done; 1 a fault was found or it broke; 2 a flag, setting, checkpoint or request that cannot work; 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is what follows the program's name. Returns the exit code (see `ExitCode`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = command_names()
    if not arguments or arguments[0].startswith("-"):
        return _overview(arguments, names)
    name, rest = arguments[0], arguments[1:]
    if name not in names:
        return _complain(f"unknown command {name!r}{_nearest(name, names)}; `jaxinfer --help` lists the commands")
    command = importlib.import_module(f"{commands.__name__}.{name}")
    prog = f"jaxinfer {name}"
    parser = argparse.ArgumentParser(prog=prog, usage=f"{prog} [flags]", description=command.HELP, epilog=EPILOG, allow_abbrev=False)
    command.add_arguments(parser)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", parser.format_help())
        nearest = _nearest(unknown[0].partition("=")[0], flags)
        return _complain(f"{name} does not know {unknown[0]!r}{nearest}; see `{prog} --help`")
    return _guarded(command.run, args)


def command_names() -> list[str]:
    """Every command, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def _overview(arguments: list[str], names: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jaxinfer",
        description="JAX/XLA inference for large language models.",
        epilog=f"`jaxinfer COMMAND --help` explains one of them. {EPILOG}",
        usage="jaxinfer COMMAND [flags]",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {jaxinfer.__version__}")
    group = parser.add_argument_group("commands")
    for name in names:
        group.add_argument(name, nargs="?", help=importlib.import_module(f"{commands.__name__}.{name}").HELP)
    _, unknown = parser.parse_known_args([a for a in arguments if a.startswith("-")])
    if unknown:
        return _complain(f"unknown flag {unknown[0]!r} before the command; `jaxinfer --help` lists the commands")
    parser.print_help(sys.stderr)
    return ExitCode.USAGE


def _guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; what its user can mend is one line on stderr, Ctrl-C and a closed pipe are quiet, a bug shows its traceback."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        for package in OWN_PACKAGES:
            logging.getLogger(package).setLevel(config.log_level())
        code = run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more at exit
        return ExitCode.CLOSED
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OWN_PACKAGES:
            raise
        return _complain(str(error))


def _complain(message: str) -> int:
    sys.stderr.write(f"jaxinfer: error: {message}\n")
    return ExitCode.USAGE


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


if __name__ == "__main__":
    sys.exit(main())
