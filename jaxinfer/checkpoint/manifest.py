"""A manifest of hashes: what each file of a folder held when it was written, so that a flipped bit is an error and not a worse model.

jaxinfer_manifest.json lists every file that is read (not READMEs and licences) with its size and SHA-256, for safetensors files also that
of each tensor, and ends with the SHA-256 of itself. Neither safetensors nor Orbax notice a changed byte in the numbers. Folders without a
manifest (what others wrote) load unchecked, but for Orbax checkpoints, which must have one. Knows no format beyond where a safetensors
header says that tensors lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.safetensors import SafetensorsFile
from jaxinfer.checkpoint.json_files import read_json

NAME = "jaxinfer_manifest.json"
VERSION = 1
BLOCK = 1 << 22
THREADS = 4
READ = (".safetensors", ".json", ".jinja", ".model")
NOT_LISTED = (NAME, "audit.json")  # an audit of these weights is written later
REMEDY = f"fetch or write the checkpoint again (who changed it on purpose deletes {NAME}; then nothing is checked)"

Tensors = Mapping[str, Mapping[str, str]]  # file -> tensor -> SHA-256


class _File(NamedTuple):
    """What a file must hold."""

    bytes: int
    sha256: str
    tensors: Mapping[str, str]


def write(folder: Path, tensors: Tensors | None = None) -> None:
    """Hash the files of a folder that is complete, and write its manifest."""
    known, names = tensors or {}, listed(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda name: _hash(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest} | ({"tensors": dict(known[name])} if name in known else {})
        for name, digest in zip(names, hashes, strict=True)
    }
    body = {"version": VERSION, "files": files}
    (folder / NAME).write_text(json.dumps(body | {"sha256": _own(body)}, indent=1))


def listed(folder: Path) -> list[str]:
    """The files of a folder that a manifest lists: what is read of it."""
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name not in NOT_LISTED)
    return [name for name in there if "/" in name or name.endswith(READ)]


def verify(
    folder: Path,
    *,
    weights: bool,
    hashes: bool = True,
    progress: Callable[[int, int], None] | None = None,
    remedy: str = REMEDY,
) -> None:
    """Compare a folder with its manifest, if it has one: the weights, or everything else (a few small files).

    hashes=False compares no more than which files there are and how long they are. progress is called with (bytes done, bytes in all),
    from any thread. remedy: what the errors say to do.

    Raises:
        CheckpointError: a file that is missing or not what it was; the message names it, and the tensor where there is one.
    """
    if not (folder / NAME).exists():
        return
    files = {name: file for name, file in _read(folder / NAME, remedy).items() if _is_weights(name) == weights}
    total = sum(file.bytes for file in files.values())
    done = [0]

    def check(name: str) -> None:
        _check(folder / name, files[name], hashes=hashes, remedy=remedy)
        done[0] += files[name].bytes
        if progress is not None:
            progress(done[0], total)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, files):
            pass


def require(folder: Path) -> None:
    """Refuse a folder that has no manifest.

    Raises:
        CheckpointError: it has none.
    """
    if not (folder / NAME).is_file():
        raise CheckpointError(
            f"{folder / NAME}: expected the hashes of this Orbax checkpoint, found no such file: Orbax does not notice damaged numbers,"
            " so nothing is read without them; write the checkpoint again with `jaxinfer quantize`"
        )


def digest_of(pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of bytes that come in pieces."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or "/" in name


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return digest_of(iter(lambda: file.read(BLOCK), b""))


def _own(body: Mapping[str, Any]) -> str:
    return digest_of([json.dumps(body, sort_keys=True, separators=(",", ":")).encode()])


def _read(path: Path, remedy: str) -> dict[str, _File]:
    body = read_json(path)
    own = body.pop("sha256", None)
    if own != _own(body):
        raise broken(path, "its own SHA-256 at the end", own, remedy=remedy)
    if body.get("version") != VERSION or not isinstance(body.get("files"), dict):
        raise broken(path, f"version {VERSION} and files", body.get("version"), remedy="use the version of jaxinfer that wrote it")
    try:
        files = {name: _File(int(it["bytes"]), str(it["sha256"]), it.get("tensors", {})) for name, it in body["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise broken(path, "bytes and sha256 of each file", "something else", remedy=remedy) from None
    outside = next((name for name in files if name.startswith("/") or ".." in Path(name).parts), None)
    if outside is not None:
        raise broken(path, "names of files in the folder", outside)
    return files


def _check(path: Path, file: _File, *, hashes: bool, remedy: str) -> None:
    if not path.is_file():
        raise broken(path, f"a file of {file.bytes} bytes, as {NAME} says", "no such file", remedy=remedy)
    size = path.stat().st_size
    if size != file.bytes:
        raise broken(path, f"{file.bytes} bytes, as {NAME} says", f"{size}", remedy=remedy)
    found = _hash(path) if hashes else file.sha256
    if found != file.sha256:
        tensor, expected, found = _culprit(path, file) or (None, file.sha256, found)
        expected = f"SHA-256 {expected[:16]}..., as {NAME} says"
        raise broken(path, expected, f"{found[:16]}...: damaged or changed", tensor=tensor, remedy=remedy)


def _culprit(path: Path, file: _File) -> tuple[str, str, str] | None:
    """The first tensor of a safetensors file that is not what it was, with both hashes; None where the header is what is wrong."""
    if not file.tensors:
        return None
    opened = SafetensorsFile(path)
    try:
        for name, tensor in opened.tensors().items():
            data = tensor.read(tuple(slice(0, size) for size in tensor.shape))
            found, expected = digest_of([data.tobytes()]), file.tensors.get(name)
            if expected is not None and found != expected:
                return name, expected, found
    finally:
        opened.close()
    return None
