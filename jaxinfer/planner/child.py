"""The process that plans one slice: `python -m jaxinfer.planner.child RESULT` reads a request on stdin and writes a plan to that file.

It describes the devices, weighs every mesh, compiles the programs that set the memory of the best one, weighs again with what the compiler
says (a mesh that does not fit after all gives way to the next), and looks for the next best step. Compilers may end the process: the
parent (planning.py) reports that. Progress goes to stdout, one JSON list a line behind `MARK`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError, EngineConfig, MeshShape, from_arguments
from jaxinfer.planner import advice, bundling, collectives, outcome, topology
from jaxinfer.planner.estimate import Choice, Estimate, Wish, estimate, kernels_for
from jaxinfer.planner.outcome import MARK
from jaxinfer.planner.predict import Kernels
from jaxinfer.planner.sizing import Sizing, longest
from jaxinfer.planner.slices import parse
from jaxinfer.planner.telling import Compiled, Told, bundle_command, flags_of, name_of, tell
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.program import Program


def main(result: Path) -> None:
    """Plan what stdin asks for; a plan that cannot be made is written with its failure."""
    request = json.loads(sys.stdin.read())
    try:
        plan = planned(request, _report)
    except (ConfigError, CheckpointError, OSError, NotImplementedError, LookupError) as error:
        target = {"slice": request["slice"]}
        plan = outcome.Plan(model=request["model"], target=target, settings={}, fits=False, failure=str(error), refused=True)
    result.write_text(json.dumps(plan.fields()), encoding="utf-8")


def planned(request: Mapping[str, Any], progress: Callable[[str, int, int], None]) -> outcome.Plan:
    """The plan for a request (see planning.py).

    Raises:
        ConfigError: settings, shapes or packages that cannot work.
    """
    piece = parse(request["slice"])
    devices = tuple(topology.describe(piece)) if request["compile"] else topology.stand_ins(piece)
    wish = _wish(request)
    meshes = [MeshShape(*request["mesh"])] if request.get("mesh") else list(piece.meshes())
    choices = [Choice(piece, mesh, wish, devices) for mesh in meshes if mesh.size == piece.devices]
    if not choices:
        raise ConfigError(f"--mesh {name_of(meshes[0])} does not use the {piece.devices} devices of {piece.name}")
    with choices[0].target():
        kernels = kernels_for(choices[0].sizing())
        weighed = sorted((estimate(choice, kernels) for choice in choices), key=lambda each: each.score, reverse=True)
    _check_bundle(request, wish)
    source = bundling.compiler(request.get("autotune"), piece.platform)
    compiled: dict[MeshShape, Compiled] = {}
    while request["compile"] and weighed[0].choice.mesh not in compiled and not weighed[0].hopeless:
        compiled[weighed[0].choice.mesh] = _compile(weighed[0], request["all"], progress)
        weighed = _again(weighed, kernels, compiled)
    with weighed[0].choice.target():
        found = list(advice.changes(weighed[0], kernels))
        plan = tell(Told(request, weighed, compiled, kernels, found))
        if request.get("bundle") is None or not plan.fits:
            return plan
        own, sizing = compiled[weighed[0].choice.mesh], weighed[0].choice.sizing()
        return _bundled(plan, request, sizing, bundling.complete(sizing, own.program, own.needed, source, progress))


def _check_bundle(request: Mapping[str, Any], wish: Wish) -> None:
    if request.get("bundle") is not None and not request["compile"]:
        raise ConfigError("--bundle keeps compiled programs, and --no-compile makes none; leave one out")
    if request.get("bundle") is None and request.get("autotune") is not None:
        raise ConfigError("--autotune goes into a bundle; add --bundle DIR")
    if request.get("bundle") is not None and wish.needs_head:
        raise ConfigError(
            "--bundle is for a start, and a start of --speculate eagle needs a real head, which may have another shape than the one made"
            " up here; name it with --draft-model, or make the weights up too with --load-format random"
        )


def _bundled(plan: outcome.Plan, request: Mapping[str, Any], sizing: Sizing, program: Program) -> outcome.Plan:
    """Write the bundle of a plan; the plan says so."""
    about = {"model": request["model"], "slice": request["slice"], "command": bundle_command(request, plan)}
    order = bundling.Order(Path(request["bundle"]), Path(request["autotune"]) if request.get("autotune") else None, about)
    made = bundling.write(order, sizing, program)
    said = {"model": request["config"].get("model", request["model"]), "bundle": made["folder"]}
    flags = [*flags_of(said), *flags_of(request["config"], ("model", *bundling.SETTINGS))]  # the bundle holds its own settings
    return replace(plan, programs={**plan.programs, "bundle": made}, command=" ".join(["python -m jaxinfer.serve", *flags]))


def _wish(request: Mapping[str, Any]) -> Wish:
    config = from_arguments(EngineConfig, request["config"])
    most = longest(request["values"])
    context = request["context"] or min(8192, most)
    if context > most:
        raise ConfigError(f"--context {context} exceeds the {most} tokens the model was made for; lower it")
    output = request["output"] or max(1, min(256, context // 4))
    if output >= context:
        raise ConfigError(f"--output {output} leaves no room for a prompt in --context {context}; lower it")
    folder = Path(request["folder"]) if request.get("folder") else None
    given = request.get("draft")
    draft = None if given is None else (given["values"], Path(given["folder"]) if given["folder"] else None)
    return Wish(dict(request["values"]), config, context, output, request["concurrency"], request["goal"], request["price"], folder, draft)


def _compile(best: Estimate, everything: bool, progress: Callable[[str, int, int], None]) -> Compiled:
    """Compile for a choice: the programs that set its memory, or all of them, with a pool of the size that is expected."""
    begun, choice = time.perf_counter(), best.choice
    with choice.target():
        sizing = choice.sizing()
        pages = max(best.account.row, best.account.pages(best.reserved))
        program = sizing.program(replace(sizing.empty_pool, pages=pages + 1))
        program.compile(progress, program.config.keys if everything else program.config.largest)
    found = {key: collectives.in_text(program.compiled(key).as_text()) for key in program.sizes if isinstance(key, Bucket)}
    return Compiled(program, found, time.perf_counter() - begun)


def _again(weighed: list[Estimate], kernels: Kernels, compiled: Mapping[MeshShape, Compiled]) -> list[Estimate]:
    """Weigh all meshes anew: with their own compiled programs, else with the most that any compiled one needs."""
    most = max(made.needed for made in compiled.values())
    again = []
    for each in weighed:
        own = compiled.get(each.choice.mesh)
        with each.choice.target():
            again.append(estimate(each.choice, kernels, own.needed if own else most, _correction(each, own) if own else 1.0))
    return sorted(again, key=lambda each: each.score, reverse=True)


def _correction(each: Estimate, own: Compiled) -> float:
    """Bytes of the collectives in the text over those that the sharding implies, of the widest decode bucket.

    A plain one if it was compiled: one with drafts has logits of every token, and what drafts follows every step, without logits.
    """
    decodes = (key for key in own.collectives if not key.prefill_tokens)
    bucket = max(decodes, key=lambda key: (-key.decode_tokens, key.rows), default=None)
    if bucket is None or each.choice.mesh.tensor == 1:
        return 1.0
    graph, placement, draft = each.predictor.graph, each.predictor.placement, own.program.config.draft
    implied = collectives.implied(graph, each.predictor.sharded, bucket.tokens, bucket.decode_size)
    if draft is not None:
        implied += collectives.implied(draft, collectives.sharded(draft, placement), bucket.tokens, rows=0)
    return max(1.0, collectives.total_bytes(own.collectives[bucket]) / collectives.total_bytes(implied))


def _report(stage: str, done: int, total: int) -> None:
    sys.stdout.write(MARK + json.dumps([stage, done, total]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
