"""A plan for people: tables of at most 100 columns. Knows the fields of `Plan` and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxinfer.planner.outcome import Plan

GIB, MIB = 1 << 30, 1 << 20


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    if plan.failure is not None:
        console.print(Text(f"{plan.model} on {plan.target['slice']}: FAILED", style="bold red"))
        console.print(Text(plan.failure), soft_wrap=True)
        return
    console.print(Group(*_parts(plan)))
    if plan.fits:
        console.print(Text("\n" + plan.command, style="bold"), soft_wrap=True)


def compare(plans: Sequence[Plan], console: Console) -> None:
    """Print plans for several slices side by side, the best for their goal first."""
    table = _table("slice", "data x tensor", "fits", "concurrency", "step ms", "TTFT ms", "tokens/s", "per M tokens")
    for plan in sorted(plans, key=_rank):
        if plan.failure is not None:
            table.add_row(plan.target["slice"], "-", "failed")
            continue
        speed = plan.speed
        table.add_row(
            plan.target["slice"], _shape(plan.settings["mesh"]), "yes" if plan.fits else "NO", str(plan.capacity["concurrency"]),
            *(_milliseconds(speed[name]) for name in ("itl", "ttft")), f"{speed['tokens_per_second']:,.0f}",
            _money(speed["cost_per_million"]),
        )  # fmt: skip
    console.print(table)


def _rank(plan: Plan) -> tuple[bool, bool, float]:
    if plan.failure is not None:
        return True, True, 0.0
    speed, goal = plan.speed, plan.settings["goal"]
    best = speed["itl"] if goal == "latency" else -speed["tokens_per_second"]
    if goal == "cost":
        best = speed["cost_per_million"] or plan.target["chips"] / speed["tokens_per_second"]
    return False, not plan.fits, best


def _parts(plan: Plan) -> list[RenderableType]:
    return [
        _head(plan), _memory(plan), _phases(plan), _speed(plan), *([_meshes(plan)] if len(plan.meshes) > 1 else []), *_programs(plan),
        *_advice(plan), *_notes(plan),
    ]  # fmt: skip


def _head(plan: Plan) -> Text:
    target, settings = plan.target, plan.settings
    lacking = f"DOES NOT FIT: {plan.memory.get('lacking', 0) / GIB:.2f} GiB a device too much"
    verdict = ("FITS", "bold green") if plan.fits else (lacking, "bold red")
    asked = f"{settings['concurrency']} sequences" if settings["concurrency"] else "one sequence or more"
    topology = f", topology {target['topology']}" if target["topology"] else ""
    devices = f"{target['chips']} chip(s), {target['devices']} device(s) of {target['chip']}{topology}"
    return Text.assemble(
        (f"{plan.model} on {target['slice']}: ", "bold"),
        verdict,
        f"\n{devices}, {target['device_memory'] / GIB:.1f} GiB for arrays each",
        f"\n{settings['weights']} weights, {asked} of {settings['context']} tokens ({settings['output']} of them generated)",
        f"\ngoal {settings['goal']}: mesh {settings['mesh']}; kernels: attention {settings['attention']}, matmul {settings['matmul']}",
    )


def _memory(plan: Plan) -> Table:
    memory, capacity = plan.memory, plan.capacity
    table = _table("per device", "GiB", "", title="Memory")
    temporary = memory["programs_temporary"]
    origin = (
        f"temporaries {temporary / MIB:.0f}, outputs {memory['programs_outputs'] / MIB:.0f}, code {memory['programs_code'] / MIB:.0f} MiB"
        if temporary is not None
        else "a guess: not compiled"
    )
    limit = f"{plan.settings['memory_fraction']:.0%} of {plan.target['device_memory'] / GIB:.1f} GiB".replace("%", " %")
    rows = (
        ("weights", memory["weights"], ""),
        ("programs", memory["programs"], origin),
        ("slots", memory["slots"], "state of running sequences"),
        ("KV pool", memory["kv_pool"], f"{memory['kv_token']:,.0f} B a token"),
        ("in all", memory["total"], f"of {memory['limit'] / GIB:.2f} ({limit})"),
    )
    for name, size, remark in rows:
        table.add_row(name, f"{size / GIB:.2f}", remark)
    table.add_section()
    table.add_row("holds", "", f"{capacity['kv_tokens']:,} tokens, {capacity['concurrency']} sequences of full length (whole slice)")
    table.add_row("room for", "", f"{capacity['largest_concurrency']} sequences of full length, were they wanted")
    return table


def _phases(plan: Plan) -> Table:
    names = ("matmul", "attention", "small", "communication")
    table = _table("ms", "all", *names, "bound by", "of peak", title="Predicted time")
    running, settings = plan.capacity["running"], plan.settings
    labels = {"decode": f"decode, {running} rows", "prefill": f"prefill, {settings['context'] - settings['output']} tokens"}
    for name, label in labels.items():
        phase = plan.phases[name]
        parts = [_milliseconds(phase[part]) for part in names]
        table.add_row(label, _milliseconds(phase["seconds"]), *parts, phase["bound"], f"{phase['utilisation'] * 100:.0f} %")
    return table


def _speed(plan: Plan) -> Text:
    speed = plan.speed
    ttft, itl, loaded = (_milliseconds(speed[name]) for name in ("ttft", "itl", "itl_loaded"))
    cost = f", {_money(speed['cost_per_million'])} per million of them" if speed["cost_per_million"] is not None else ""
    rate = f"{speed['tokens_per_second']:,.0f} generated tokens/s with {plan.capacity['running']} running{cost}"
    return Text(f"TTFT {ttft} ms alone; ITL {itl} ms, {loaded} ms with others' prompts in between; {rate}")


def _meshes(plan: Plan) -> Table:
    table = _table(
        "data x tensor", "fits", "weights GiB", "KV tokens", "sequences", "ITL ms", "links", "TTFT ms", "tokens/s", title="Meshes"
    )
    for row in plan.meshes:
        fits = "yes" if row["fits"] else f"-{row['lacking'] / GIB:.1f} GiB"
        table.add_row(
            _shape(row["mesh"]) + ("" if row["compiled"] else " *"), fits, f"{row['weights'] / GIB:.2f}", f"{row['kv_tokens']:,}",
            str(row["concurrency"]), *(_milliseconds(row[name]) for name in ("itl", "communication", "ttft")),
            f"{row['tokens_per_second']:,.0f}",
        )  # fmt: skip
    if any(not row["compiled"] for row in plan.meshes):
        table.caption = "* not compiled; what its programs need is taken from the compiled one"
    return table


def _shape(mesh: str) -> str:
    return " x ".join(part.partition("=")[2] for part in mesh.split(","))


def _programs(plan: Plan) -> list[RenderableType]:
    rows = plan.programs["compiled"]
    if not rows:
        return []
    table = _table("compiled", "temporaries MiB", "code MiB", "s", "collectives", title="Programs")
    for row in rows:
        made = ", ".join(f"{each['count']} {each['kind']} of {each['bytes'] / MIB:.2f} MiB" for each in row["collectives"]) or "-"
        table.add_row(row["name"], f"{row['temporary'] / MIB:.1f}", f"{row['code'] / MIB:.1f}", f"{row['seconds']:.1f}", made)
    table.caption = (
        f"{plan.programs['seconds']:.0f} s; {plan.programs['derived']} more programs of the list are smaller and were not compiled (--all)"
    )
    if not plan.programs["derived"]:
        table.caption = f"{plan.programs['seconds']:.0f} s; the whole list"
    return [table]


def _advice(plan: Plan) -> list[RenderableType]:
    if not plan.advice:
        return [Text("No change would make it fit." if not plan.fits else "No single change helps the goal by 3 %.", style="yellow")]
    lines = [Text("What would make it fit:" if not plan.fits else "Next best step:", style="bold yellow")]
    lines += [Text(_change(each)) for each in plan.advice]
    return list(lines)


def _change(each: Mapping[str, Any]) -> str:
    remark = f"; {each['remark']}" if each["remark"] else ""
    return f"  {each['change']} ({each['flags']}): {each['effect']}{remark}"


def _notes(plan: Plan) -> list[RenderableType]:
    return [Text("Efficiencies and guesses:", style="dim"), *(Text(f"  {note}", style="dim") for note in plan.notes)]


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE, title=title, title_justify="left", title_style="bold", caption_justify="left", padding=(0, 1), pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not column or column in ("bound by", "collectives") else "right")
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _money(price: float | None) -> str:
    return "-" if price is None else f"USD {price:.3g}"
