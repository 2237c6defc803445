"""Make the notebooks from their sources: `python notebooks/build.py` writes NAME.ipynb beside each NAME.py (jupytext, percent format).

The .py is what people edit and review. The .ipynb gets a Colab badge in front, the repository's name where the source says so, cell
names that do not change from build to build, and no outputs. `--check` writes nothing and fails if a notebook is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat

REPOSITORY = "OWNER/jaxinfer"  # owner and name on GitHub, filled in at the release
BRANCH = "main"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{name}.ipynb)"
)
FOLDER = Path(__file__).parent


def build(source: Path) -> str:
    """The text of the notebook that belongs to a source."""
    text = source.read_text(encoding="utf-8").replace("{{REPOSITORY}}", REPOSITORY)
    notebook = jupytext.reads(text, fmt="py:percent")
    badge = BADGE.format(repository=REPOSITORY, branch=BRANCH, name=source.stem)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(badge))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        cell["metadata"] = {}
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def sources() -> list[Path]:
    """The notebooks' sources: numbered files of this folder."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def main() -> int:
    """Build all, or check all; 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is out of date")
    check = parser.parse_args().check
    stale = [source for source in sources() if _current(source) != build(source)]
    for source in stale:
        print(f"{source.with_suffix('.ipynb').name} {'is out of date' if check else 'written'}", file=sys.stderr)
        if not check:
            source.with_suffix(".ipynb").write_text(build(source), encoding="utf-8")
    return int(check and bool(stale))


def _current(source: Path) -> str | None:
    notebook = source.with_suffix(".ipynb")
    return notebook.read_text(encoding="utf-8") if notebook.exists() else None


if __name__ == "__main__":
    sys.exit(main())
