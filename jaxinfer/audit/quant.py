"""What quantisation costs on the user's own prompts: every scheme beside the unquantised model, with a verdict against a budget.

    python -m jaxinfer audit quant --model M --schemes int8,kv-int8 --data FILE.jsonl --max-kl 0.02 --html audit.html

Each line of the file is {"prompt"} or {"messages"}, with an optional {"completion"}, which is what is scored; where there is none the
unquantised model's own greedy continuation is. `--max-kl` bounds the mean KL divergence per scored token. Exit codes: 0 every scheme is
within the budget, 1 one is over it (or has a number that is not finite), 2 the data, a flag or the model cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxinfer import prompts
from jaxinfer.audit import schemes
from jaxinfer.audit.report import Data, Report, Scheme, rows
from jaxinfer.audit.task import HOW, Metric
from jaxinfer.checkpoint import audit_record
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import print_table, warn

HELP = "compare quantised numbers with the unquantised model on your own prompts; 0 within the budget, 1 over, 2 bad input"

Stamp = Callable[[], dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this audit."""
    group = parser.add_argument_group("audit")
    lines = 'JSON lines {"prompt"} or {"messages"}, with an optional {"completion"}'
    group.add_argument("--data", type=Path, required=True, metavar="FILE", help=lines)
    listed = f"comma-separated [all that run]: {', '.join(schemes.known())}; both at once: int8+kv-int8"
    group.add_argument("--schemes", metavar="NAMES", help=listed)
    group.add_argument("--reference", metavar="MODEL", help="the unquantised model, where --model is a quantised checkpoint")
    group.add_argument("--max-kl", type=float, default=0.02, metavar="NATS", help="budget: mean KL divergence per scored token [0.02]")
    group.add_argument("--metric", metavar="CMD", help=f'a score of your own: gets lines {{"prompt", "completion", "output"}}; {HOW}')
    group.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of greedy outputs [64]")
    scored = "tokens to score: all adds the prompts' [completion]"
    group.add_argument("--score", choices=("completion", "all"), default="completion", help=scored)
    group.add_argument("--repeat", type=int, default=3, metavar="N", help="timed turns of each model; 0 times nothing [3]")
    group.add_argument("--seed", type=int, default=0, help="of the bootstrap [0]")
    output = parser.add_argument_group("output", "stdout carries the result alone.")
    output.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    output.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with plots")
    kept = "keep the figures in the checkpoint's folder, for --require-audit; the default for a quantised checkpoint"
    output.add_argument("--record", action=argparse.BooleanOptionalAction, default=None, help=kept)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace, stamp: Stamp) -> int:
    """Audit and show; 1 if a scheme is over the budget. stamp: says where, when and with what, once jax is up."""
    _check(args)
    metric = None if args.metric is None else Metric.of(args.metric)
    lines = prompts.read(args.data)

    from jaxinfer.checkpoint import hub

    values = vars(args)
    folder = hub.resolve(values.get("model", EngineConfig().model.model), values.get("revision"))
    stored = audit_record.is_quantised(folder)
    if stored != (args.reference is not None):
        raise ConfigError(
            f"{folder.name} is quantised: name the unquantised model it was made from with --reference MODEL" if stored
            else f"--reference is for quantised checkpoints; {folder.name} is not quantised and is its own reference"
        )  # fmt: skip
    report = audit(args, lines, metric, folder, stamp)
    if args.html is not None:
        from jaxinfer.audit import page

        _write(args.html, page.render(report))
    if args.record or (args.record is None and stored):
        warn(f"recorded in {audit_record.write(folder, entries(report, folder))}")
    show(report, as_json=args.json)
    return int(not report.within)


def audit(args: argparse.Namespace, lines: prompts.Lines, metric: Metric | None, folder: Path, stamp: Stamp) -> Report:
    """Everything between reading the data and showing the result.

    Raises:
        ConfigError, CheckpointError, TokenizerError: a line, a scheme or a model that cannot be used.
    """
    from jaxinfer.audit import session
    from jaxinfer.checkpoint import read
    from jaxinfer.models import find
    from jaxinfer.tokenizer import Tokenizer

    values = vars(args)
    chosen = schemes.read(args.schemes, stored=args.reference is not None)
    shape = read.of_model(read.read_config(folder))
    context = find.find(shape.get("model_type")).Config.from_hf(shape).max_positions
    documents = prompts.encode(lines, Tokenizer.load(folder), values.get("max_model_len") or context)
    options = session.Options(args.max_tokens, args.max_kl, args.score == "all", args.repeat, args.seed, metric)
    own = {} if args.reference is None else {"model": args.reference, "revision": None}
    with session.open_engine(session.settings(values, own, documents, args.max_tokens)) as plain:
        basis, found, left_out = session.begin(plain, documents, options), list[Scheme](), dict[str, str]()
        traces: list[Any] = []
        for name, changes in chosen.items():
            try:
                other = session.open_engine(session.settings(values, changes, documents, args.max_tokens))
            except ConfigError as error:
                if args.schemes is not None:
                    raise ConfigError(f"--schemes {name}: {error}") from None
                left_out[name] = str(error)
                warn(f"{name} is left out: {error}")
                continue
            with other:
                made, traces = session.judge(basis, name, other, context)
            found.append(made)
        if not found:
            raise ConfigError(f"no scheme can run here: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
        reference, info = session.reference(basis, traces, context), plain.engine.info
    about = Data(
        file=lines.name, sha256=lines.sha256, documents=len(documents), own=sum(not it.completion for it in documents),
        tokens=found[0].divergence.tokens, cut=sum(it.cut for it in documents), longest=max(len(text.tokens) for text in basis.texts),
    )  # fmt: skip
    name = str(values.get("model", info.model))
    return Report(name, info.dtype, args.max_kl, about, reference, tuple(found), left_out, stamp())


def show(report: Report, *, as_json: bool) -> None:
    """Write the result to stdout."""
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(), ensure_ascii=False, allow_nan=False) + "\n")
        return
    print_table(f"{report.model}, {report.dtype}, {report.stamp.get('device', 'unknown device')}", rows(report))
    sys.stdout.write("\n".join([*report.contexts(), *report.notes(), f"verdict: {report.verdict()}"]) + "\n")


def entries(report: Report, folder: Path) -> dict[str, dict[str, Any]]:
    """What is recorded of each scheme: figures and hashes."""
    weights, plain, made = audit_record.fingerprint(folder), report.as_json(), {}
    for scheme in plain["schemes"]:
        kl = scheme["divergence"]
        made[scheme["name"]] = {
            "weights": weights, "data": report.data.sha256, "documents": report.data.documents, "tokens": kl["tokens"],
            "own_continuations": report.data.own, "kl_mean": None if kl["not_finite"] else kl["mean"]["value"],
            "kl_low": kl["mean"]["low"], "kl_high": kl["mean"]["high"], "kl_p99": kl["p99"], "kl_largest": kl["largest"],
            "flips": scheme["flips"], "perplexity_ratio": scheme["perplexity_ratio"]["value"], "dtype": report.dtype,
            **{name: report.stamp.get(name) for name in ("device", "jaxinfer", "jax", "date")},
        }  # fmt: skip
    return made


def _check(args: argparse.Namespace) -> None:
    """Refuse at once what cannot be."""
    values: Mapping[str, Any] = vars(args)
    for flag in ("quantize", "kv_dtype"):
        if values.get(flag) not in (None, "auto"):
            raise ConfigError(f"--{flag.replace('_', '-')}: the audit compares with the unquantised model; name schemes with --schemes")
    if values.get("load_format") == "random":
        raise ConfigError("--load-format random: made-up weights have nothing to lose; give a model")
    if "mesh" in values and values["mesh"].data > 1:
        raise ConfigError(f"--mesh data={values['mesh'].data}: the audit runs on one replica; use tensor={values['mesh'].size}")
    if values.get("require_audit") is not None:
        raise ConfigError("--require-audit is for serving; here --max-kl is the budget")
    for flag, low in (("max_tokens", 1), ("repeat", 0), ("seed", 0)):
        if values[flag] < low:
            raise ConfigError(f"--{flag.replace('_', '-')} {values[flag]} is below {low}")
    if not values["max_kl"] >= 0:
        raise ConfigError(f"--max-kl {values['max_kl']:g}: give nats per token, for example 0.02")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None
