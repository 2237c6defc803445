"""What can be audited: every scheme of `jaxinfer/quant`, every dtype of the KV cache, what a checkpoint has stored, and combinations.

A scheme's name says which settings of the engine it stands for: `int8` is --quantize int8, `kv-int8` is --kv-dtype int8, `stored` is a
quantised checkpoint as it is, `int8+kv-int8` is both. Nothing is registered: the folder and the setting's choices are the list.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from jaxinfer.checkpoint.audit_record import KV, STORED
from jaxinfer.config import KV_DTYPES, ConfigError
from jaxinfer.quant import find

Settings = dict[str, Any]


def known() -> tuple[str, ...]:
    """Names of the single schemes that exist, weights first."""
    return (*find.schemes(), *(KV + name for name in KV_DTYPES if name != "auto"))


def read(text: str | None, *, stored: bool) -> dict[str, Settings]:
    """The named schemes (None: all that apply) with the engine's settings that each changes. Names stand between commas, or between
    semicolons where one has exceptions of its own: `int8;int8,lm_head=keep`.

    stored: whether the checkpoint is quantised already; then its weights are what they are, and the KV cache alone can vary.

    Raises:
        ConfigError: a scheme that does not exist or does not go with another, or one named twice.
    """
    every = [STORED] if stored else list(known())
    between = ";" if text is not None and ";" in text else ","
    names = every if text is None else [part.replace(" ", "") for part in text.split(between) if part.strip()]
    if not names:
        raise ConfigError(f"--schemes {text!r} names none; there are: {', '.join(every)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--schemes {text}: the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    if between == "," and any("=" in name for name in names):
        raise ConfigError(f"--schemes {text}: write semicolons between schemes where one has exceptions, as in int8;int8,lm_head=keep")
    return {name: _settings(name, stored=stored) for name in names}


def _settings(name: str, *, stored: bool) -> Settings:
    parts = name.split("+")
    weights = [part for part in parts if not part.startswith(KV)]
    usable = [STORED, *(part for part in known() if part.startswith(KV))] if stored else known()
    for part in parts:
        scheme = part.partition(",")[0]
        if scheme not in usable and (stored or "=" not in scheme):  # the engine checks patterns
            raise ConfigError(f"--schemes: {_unusable(scheme, usable, stored=stored)}")
    if len(weights) > 1 or len(parts) - len(weights) > 1:
        raise ConfigError(f"--schemes: {name!r} names more than one scheme for the same numbers; write for example int8+kv-int8")
    if stored and not weights:
        raise ConfigError(f"--schemes: this checkpoint is quantised; write {STORED}+{name}")
    given = [("kv_dtype", part.removeprefix(KV)) if part.startswith(KV) else ("quantize", part) for part in parts if part != STORED]
    return dict(given)


def _unusable(scheme: str, usable: Sequence[str], *, stored: bool) -> str:
    near = difflib.get_close_matches(scheme, usable, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    why = "cannot be asked of a checkpoint that is quantised already" if stored and scheme in known() else "does not exist"
    return f"the scheme {scheme!r} {why}; there are: {', '.join(usable)}{hint}"
