"""What audits found, kept beside the weights they are of: `audit.json` in the checkpoint's folder.

`jaxinfer audit quant` writes an entry for each scheme, `serve --require-audit kl=0.02` reads it before anything is loaded. An entry is of
exact bytes: it carries a SHA-256 over config.json and all weights (their manifest of hashes, where there is one, which loading verifies),
and one of other weights counts as missing. It holds figures and hashes, nothing of the prompts. A scheme's name says what of the numbers
is quantised; see `name_of`.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.config import ConfigError, parse_audit_budget

FILE = "audit.json"
FORMAT = 1
WEIGHTS = "*.safetensors"
KV, STORED = "kv-", "stored"
CHUNK = 1 << 22


def is_quantised(folder: Path) -> bool:
    """Whether a checkpoint's weights are stored quantised.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    return read_json(folder / "config.json").get(FIELD) is not None


def name_of(quantize: str | None, kv_dtype: str, *, stored: bool) -> str:
    """The name of what is quantised: `stored` for a checkpoint's own weights, otherwise what --quantize says, then `kv-` and what
    --kv-dtype says, with a plus between; empty where nothing is."""
    weights = quantize.replace(" ", "") if quantize else STORED if stored else ""
    return "+".join(part for part in (weights, KV + kv_dtype if kv_dtype != "auto" else "") if part)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a folder's config.json and its manifest of hashes, or where it has none over every weight file: names and contents,
    all of which is read, several files at a time.

    Raises:
        CheckpointError: a file cannot be read.
    """
    hashes = folder / manifest.NAME
    files = [folder / "config.json", *([hashes] if hashes.is_file() else sorted(folder.glob(WEIGHTS)))]
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_digest, files))
    lines = (f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Add entries (by scheme) to a folder's record or replace those that it has; returns the file, which is replaced as a whole.

    Raises:
        CheckpointError: a record that cannot be read, or a folder that cannot be written to.
    """
    path = folder / FILE
    record = {"format": FORMAT, "audits": {**_entries(path), **entries}}
    aside = path.with_name(f".{FILE}.{secrets.token_hex(4)}")
    try:
        aside.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; copy the checkpoint to a folder of your own") from None
    return path


def require(folder: Path | None, scheme: str, wanted: str, model: str) -> None:
    """Refuse a quantised model unless its record holds an audit of these very weights within the budget. Nothing quantised passes.

    scheme: see `name_of`. wanted: the text of --require-audit. model: what the user calls the model.

    Raises:
        ConfigError: no audit, one of other weights, or one over the budget, with the command to run. CheckpointError: a damaged record.
    """
    budget = parse_audit_budget(wanted)
    if not scheme:
        return
    reference = " --reference UNQUANTISED" if scheme.startswith(STORED) else ""
    command = f"python -m jaxinfer audit quant --model {model}{reference} --schemes '{scheme}' --data FILE.jsonl --record"
    refused = f"--require-audit {wanted}: {model} with {scheme}"
    entry = None if folder is None else _entries(folder / FILE).get(scheme)
    if folder is None or entry is None:
        raise ConfigError(f"{refused} has no recorded audit; run: {command}")
    found = _kl(folder / FILE, entry)
    if found > budget:
        raise ConfigError(
            f"{refused} has an audit over it: mean KL {found:.3g} nats per token; keep more weights unquantised, take another scheme, or,"
            f" if your data has changed, run: {command}"
        )
    if entry.get("weights") != fingerprint(folder):
        raise ConfigError(f"{refused} has an audit of other weights: the files have changed since; run: {command}")


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    record = read_json(path)
    entries = record.get("audits")
    if record.get("format") != FORMAT or not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise broken(path, f'"format": {FORMAT} and an object "audits"', "something else", remedy="remove it and run the audit again")
    return entries


def _kl(path: Path, entry: Mapping[str, Any]) -> float:
    """The entry's mean divergence; one that was no finite number is recorded as null and is over every budget."""
    value = entry.get("kl_mean")
    if value is None and "kl_mean" in entry:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise broken(path, "kl_mean, a number", value, remedy="remove it and run the audit again")
    return float(value)


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
    except OSError as error:
        raise broken(file, "a readable file", error.strerror or "an error") from None
    return found.hexdigest()
