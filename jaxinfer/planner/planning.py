"""`jaxinfer.plan()`: what a model would need and do on slices that are not there, each planned in a process of its own.

Here the model's config.json is found, the request is put together, and a child (child.py) started; a child that dies is a plan with a
failure. No backend of jax is started here: the parent's own devices are left alone. This file does not know how anything is planned.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxinfer import devices
from jaxinfer.checkpoint import atomic, hub
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.config import ConfigError, EngineConfig, MeshShape, engine_settings, from_arguments, parse_count, parse_mesh
from jaxinfer.models import eagle, find
from jaxinfer.planner.outcome import GOALS, MARK, Plan, Wanted
from jaxinfer.planner.sizing import draft_of
from jaxinfer.planner.slices import parse

TAIL = 12  # lines of a dead child's stderr that are shown

Progress = Callable[[str, int, int], None]


def plan(model: str, slice: str, *, mesh: str | MeshShape | None = None, context: int | str | None = None, **options: Any) -> Plan:
    """Plan a model (a well-known shape, a folder with a config.json, that file, 'demo' or a Hugging Face repository) on a slice.

    slice: for example v5e-8, v6e-4, v5p-8, tpu7x-8, h100x8, h200x1, b200x8. context: tokens of a sequence ("8k"). mesh: "data=2,tensor=4"
    (default: all are compared). options: the other fields of `Wanted` (concurrency, output, goal, price, ...) and settings of the engine
    (quantize="int8", page_size=64, ...). The compiler runs in a process of its own; the returned `Plan` says if it died.

    Raises:
        ConfigError: an unknown slice, shape, option or setting, or a compiler that is not installed. CheckpointError: no such model.
    """
    own = {name: value for name, value in options.items() if name in Wanted._fields}
    settings = {name: value for name, value in options.items() if name not in own}
    unknown = sorted(set(settings) - set(engine_settings()))
    if unknown:
        raise ConfigError(f"plan() has no option {unknown[0]!r}; there are {', '.join(Wanted._fields)} and the engine's settings")
    arranged = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    tokens = parse_count(context) if isinstance(context, str) else context
    made = run(model, slice, Wanted(**{**own, "mesh": arranged, "context": tokens}), settings)
    if made.failure is not None and made.refused:
        raise ConfigError(made.failure)
    return made


def run(model: str, slice: str, wanted: Wanted, settings: Mapping[str, Any], progress: Progress | None = None) -> Plan:
    """Plan in a child and wait for it; see `plan`. settings: of the engine, by name.

    Raises:
        ConfigError: an unknown slice or shape, or settings that cannot work. CheckpointError: no such model, or a taken place for a bundle.
    """
    piece = parse(slice)
    if wanted.goal not in GOALS:
        raise ConfigError(f"--goal {wanted.goal!r} is not one of {', '.join(GOALS)}")
    draft = draft_of(from_arguments(EngineConfig, {**settings, "model": model}), weights=False)
    if wanted.bundle is not None:
        atomic.check_target(Path(wanted.bundle), overwrite=False, flag="--bundle")
    values = read_shape(model, settings.get("revision"))
    request = {**wanted._asdict(), "model": model, "slice": piece.name, "values": values, "config": {**settings, "model": model}}
    request["folder"] = _weights_of(model)
    if draft is not None:
        made_up = {"values": None, "folder": None}
        request["draft"] = made_up if draft.name is None else {"values": read_shape(draft.name), "folder": _weights_of(draft.name)}
    with tempfile.TemporaryDirectory(prefix="jaxinfer-plan-") as folder:
        result = Path(folder) / "plan.json"
        code, errors = _child(json.dumps(request), result, piece.platform, progress)
        if result.is_file():
            return Plan(**json.loads(result.read_text(encoding="utf-8")))
    tail = "\n".join(errors.splitlines()[-TAIL:]) or "it said nothing"
    died = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Plan(model, {"slice": piece.name}, {}, fits=False, failure=f"the process that compiles for {piece.name} died ({died}):\n{tail}")


def read_shape(model: str, revision: str | None = None) -> Mapping[str, Any]:
    """The config.json of a model or an EAGLE-3 head: a well-known shape by name, the file itself, a folder that has one, or a
    repository's at a revision.

    Raises:
        ConfigError: a shape whose architecture is not implemented, or a misspelt one. CheckpointError: no such model.
    """
    path = Path(model).expanduser()
    if find.is_shape(model):
        values = find.find_shape(model)
    elif path.suffix == ".json" and path.is_file():
        values = read_json(path)
    elif "/" in model or path.is_dir() or model in hub.EMBEDDED:
        values = read_json(hub.resolve(model, revision, patterns=("config.json",)) / "config.json")
    else:
        values = find.find_shape(model)
    if not eagle.is_head(values):
        find.find(values.get("model_type"))
    return values


def _weights_of(model: str) -> str | None:
    """The folder that holds a model's weights, if they are here."""
    folder = hub.resolve(model) if model in hub.EMBEDDED else Path(model).expanduser()
    return str(folder.resolve()) if any(folder.glob("*.safetensors")) else None


def _child(request: str, result: Path, platform: str, progress: Progress | None) -> tuple[int, str]:
    """Run child.py; its exit code and what it wrote to stderr."""
    command = [sys.executable, "-m", "jaxinfer.planner.child", str(result)]
    environment = devices.environment_for_described(platform, Path(__file__).parents[2])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stderr=errors, env=environment, **pipes) as process,  # noqa: S603
    ):
        try:
            _talk(process, request, progress)
            code = process.wait()
        finally:
            process.kill()
        errors.seek(0)
        return code, errors.read()


def _talk(process: subprocess.Popen[str], request: str, progress: Progress | None) -> None:
    """Send the request, then hand on progress until the child closes its output."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the child has no pipes")
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:
        return
    for line in process.stdout:
        if line.startswith(MARK) and progress is not None:
            progress(*json.loads(line[len(MARK) :]))
