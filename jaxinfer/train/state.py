"""What a run keeps so that it can go on: its settings, the texts, what was measured before, and the last state (Orbax).

A folder of its own beside the result: `settings.json` says which run it belongs to, so that another run never goes on from it;
`step-NNNNNNNN` is the last state, written by Orbax beside its place and renamed when whole, and only then is the one before removed. A
process killed at any moment leaves a state from which the same run ends with the same bits. This file does not know what is trained.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.train.learner import State

STEP = re.compile(r"step-(\d{8})")


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin a run, or find the one that was begun.

        Raises:
            CheckpointError: the folder belongs to another run, or holds something else.
        """
        self.folder = folder
        path, given = folder / "settings.json", json.loads(json.dumps(settings))
        if path.is_file():
            known = read_json(path)
            differs = sorted(name for name in known.keys() | given.keys() if known.get(name) != given.get(name))
            if differs:
                raise CheckpointError(
                    f"{folder}: a run with another {', '.join(differs)} was begun here (was {_short(known, differs)}); give it the same"
                    " again to go on, remove the folder to begin anew, or name another with --state"
                )
            return
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder}: expected the state of a run or an empty folder, found other files; name another with --state")
        folder.mkdir(parents=True, exist_ok=True)
        self.note("settings", given)

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a JSON object, whole or not at all."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
        Path(partial).replace(self.folder / f"{name}.json")

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was kept under this name, None if nothing was."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    @property
    def texts(self) -> Path:
        """Where the texts are kept."""
        return self.folder / "texts.json"

    def save(self, state: State) -> None:
        """Keep a state; the one before goes when this one is whole."""
        import orbax.checkpoint as ocp

        path = (self.folder / f"step-{int(state.step):08d}").absolute()
        if path.exists():
            return
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, _named(state))
        for other in self.folder.glob("step-*"):
            if other.name != path.name:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, like: State) -> State:
        """The last state, laid out as `like`; `like` itself if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        import orbax.checkpoint as ocp

        last = max((path for path in self.folder.glob("step-*") if STEP.fullmatch(path.name)), default=None)
        if last is None:
            return like
        leaves, structure = jax.tree.flatten(like)
        described = {str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for i, leaf in enumerate(leaves)}
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(last.absolute(), described)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            remedy = "remove the folder and begin anew"
            raise broken(last, "a state that Orbax reads", f"{type(error).__name__}: {lines[0]}", remedy=remedy) from None
        return jax.tree.unflatten(structure, [found[str(i)] for i in range(len(leaves))])

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _named(state: State) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _short(known: Mapping[str, Any], names: list[str]) -> str:
    text = ", ".join(f"{name} {known.get(name)!r}" for name in names)
    return text if len(text) <= 200 else text[:197] + "..."
