"""A folder that is there whole or not at all: filled beside its place, then moved into it in one step.

The sibling `.NAME.partial-XXXX` is locked by the process that fills it; what a killed process left is removed by the next one that
writes to the same place. Replacing a folder swaps the two names at once (Linux's renameat2 with RENAME_EXCHANGE), so at any moment the
name leads to the old tree or to the new one.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxinfer.checkpoint.errors import CheckpointError

MARK = ".partial-"
HERE, EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def check_target(target: Path, *, overwrite: bool, flag: str = "--out") -> None:
    """Refuse a place that must not be written to, before any work is done. flag: what it was named with.

    Raises:
        CheckpointError: it is taken and may not be overwritten, or holds something that is no checkpoint.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{flag} {target}: expected a new or an existing folder, found something else there")
    if not any(target.iterdir()):
        return
    if not overwrite:
        replace = ", or add --overwrite to replace it" if flag == "--out" else ""
        raise CheckpointError(f"{flag} {target}: it exists already; name another folder{replace}")
    if not (target / "config.json").is_file():
        raise CheckpointError(f"--out {target}: --overwrite replaces model folders only, and this one has no config.json")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False, flag: str = "--out") -> Iterator[Path]:
    """A folder to fill. It becomes `target` when the block ends without an error, and is removed when it ends with one.

    Raises:
        CheckpointError: `check_target` refuses the place, or the file system cannot swap folders.
    """
    check_target(target, overwrite=overwrite, flag=flag)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        partial = target.parent / f".{target.name}{MARK}{secrets.token_hex(6)}"
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{flag} {target}: {error.strerror or error}") from None
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield partial
        _sync(partial)
        _move(partial, target)
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or what was there before


def sweep(target: Path) -> None:
    """Remove what killed processes left beside a place; siblings that are being filled stay."""
    for partial in target.parent.glob(f".{target.name}{MARK}*"):
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    """Have everything in a folder written to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(partial: Path, target: Path) -> None:
    if target.exists():
        _exchange(partial, target)
    else:
        partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) != 0:
        why = "this system has no renameat2" if rename is None else os.strerror(ctypes.get_errno())
        raise CheckpointError(f"--out {other}: folders cannot be swapped in one step here ({why}); name a new folder")
