"""Turn the reports of the training stages into what the model card shows: `training.json`, `loss.png` and Markdown tables.

    python -m checkpoints.card REPORT [REPORT ...] [--attribution FILE] --out DIR

Life of the data: report.json of each stage, in order -> one JSON file with thinned curves, one picture, tables on standard output to be
pasted into the card. What this file does NOT know: how anything was measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

KEPT_ROWS = 70
SERIES = {"prose": "demo, prose", "chat": "demo, chat", "draft": "draft, both"}


def thinned(report: dict[str, Any]) -> dict[str, Any]:
    """The report with at most KEPT_ROWS rows of its curve, each the mean of the rows around it, and numbers rounded."""
    curve = report["curve"]
    size = max(1, -(-len(curve) // KEPT_ROWS))
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    means = [
        {"step": group[-1]["step"]} | {name: round(sum(row[name] for row in group) / len(group), 4) for name in SERIES} for group in groups
    ]
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in report.items()}
    return rounded | {"curve": means}


def draw(stages: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses over all stages against millions of tokens into a small PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    before = 0.0
    for number, stage in enumerate(stages):
        per_step = stage["tokens"] / stage["steps"] / 1e6
        tokens = [before + row["step"] * per_step for row in stage["curve"]]
        for color, (name, label) in zip(("C0", "C1", "C2"), SERIES.items(), strict=True):
            axes.plot(tokens, [row[name] for row in stage["curve"]], color=color, label=label if number == 0 else None)
        before += stage["tokens"] / 1e6
        if number + 1 < len(stages):
            axes.axvline(before, color="0.7", linestyle="--")
    axes.set(xlabel="million tokens", ylabel="nats per counted token", ylim=(0, 7))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def tables(stages: list[dict[str, Any]]) -> str:
    """Markdown: accuracy per skill after every stage, and the last stage's samples."""
    lines = ["| skill | " + " | ".join(f"stage {i + 1}" for i in range(len(stages))) + " | instances |", "|---" * (len(stages) + 2) + "|"]
    for name, row in stages[-1]["skills"].items():
        shares = [f"{stage['skills'][name]['accuracy']:.1%}" if name in stage["skills"] else "" for stage in stages]
        lines.append(f"| {name} | {' | '.join(shares)} | {row['instances']} |")
    for kind, samples in stages[-1]["samples"].items():
        lines += ["", f"| prompt | reply ({kind}) |", "|---|---|"]
        lines += [f"| {_cell(sample['prompt'])} | {_cell(sample['reply'])} |" for sample in samples]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text for one cell of a table."""
    return text.replace("|", "\\|").replace("\n\n", " ¶ ").replace("\n", " / ")


def attribution(file: Path) -> str:
    """The authors of the stories, each once, with how many stories are theirs, per licence."""
    counts: dict[str, dict[str, int]] = {}
    for _, _, note in json.loads(file.read_text(encoding="utf-8")):
        licence, _, authors = note.partition(";")
        for author in filter(None, (name.strip() for name in authors.split(","))):
            counts.setdefault(licence, {}).setdefault(author, 0)
            counts[licence][author] += 1
    sections = []
    for licence, authors in counts.items():
        names = [name if number == 1 else f"{name} ({number})" for name, number in sorted(authors.items())]
        sections.append(f"**{licence}:** " + ", ".join(names) + ".")
    return "\n\n".join(sections)


def main(arguments: list[str] | None = None) -> None:
    """Write training.json and loss.png into OUT, print the tables and the attribution."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of each stage, in order")
    parser.add_argument("--attribution", type=Path, help="the stories' attribution file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    stages = [thinned(json.loads(path.read_text(encoding="utf-8"))) for path in options.reports]
    (options.out / "training.json").write_text(json.dumps(stages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(stages, options.out / "loss.png")
    print(tables(stages))
    if options.attribution:
        print("\n" + attribution(options.attribution))


if __name__ == "__main__":
    main()
