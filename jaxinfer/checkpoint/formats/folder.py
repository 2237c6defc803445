"""The weight files of a Hugging Face folder: one model.safetensors, or several that an index names.

Opens them all and answers with every tensor by name, still in its file. The index is not trusted: its file names must be plain names
inside the folder, and each file must hold exactly the tensors that the index places there. Files other than these are not opened.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.safetensors import LazyTensor, SafetensorsFile
from jaxinfer.checkpoint.json_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The open weight files of a folder; use it with `with`, or call `close`."""

    def __init__(self, folder: Path) -> None:
        """Open and check every weight file.

        Raises:
            CheckpointError: no weights, a damaged file or index, a tensor that is in no file or in two.
        """
        self.listing = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)  # the file that says which tensors there are
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, LazyTensor] = {}
        try:
            for name, promised in _expected(folder).items():
                self._open(folder / name, promised)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; may be called twice."""
        for file in self.files:
            file.close()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, path: Path, promised: frozenset[str] | None) -> None:
        file = SafetensorsFile(path)
        self.files.append(file)
        missing = sorted(promised - set(file.entries)) if promised is not None else []
        extra = sorted(set(file.entries) - promised) if promised is not None else []
        if missing:
            raise broken(path, "the tensor that the index places in this file", "none of that name", tensor=missing[0])
        if extra:
            raise broken(
                path, "only tensors that the index places in this file", "one that it places elsewhere or not at all", tensor=extra[0]
            )
        self.tensors.update(file.tensors())


def _expected(folder: Path) -> dict[str, frozenset[str] | None]:
    """File names, each with the tensors that must be in it; None: whatever it holds."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    mapping = read_json(folder / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise broken(folder / INDEX, "weight_map, an object of tensor names and file names", mapping)
    files: dict[str, set[str]] = {}
    for tensor, name in mapping.items():
        if not _is_plain(name):
            raise broken(folder / INDEX, "a plain *.safetensors name inside the folder", name, tensor=tensor)
        files.setdefault(name, set()).add(tensor)
    return {name: frozenset(tensors) for name, tensors in files.items()}


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0:")


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: expected a model folder, found none"
    there = sorted(path.name for path in folder.iterdir())
    single = [name for name in there if name.endswith(".safetensors")]
    pickled = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    why = (
        f"{pickled[0]} is a pickle, which can run code: convert it to safetensors"
        if pickled
        else f"it holds {', '.join(there[:12]) or 'nothing'}"
    )
    if len(single) == 1:
        why = f"if {single[0]} holds all of its weights, rename it to {SINGLE}"
    return f"{folder}: expected {SINGLE} or {INDEX}, found neither; {why}"
