"""What the target says to the user's prompts: the texts that a student learns from, and those that it is measured on.

A line with a completion is learned as it stands; every other prompt is answered by the target at each temperature, with a seed of its own,
through the engine as any request. Lines that are held out are always answered by the target, since only its own tokens are what drafts
are compared with. Texts go to a file, so that a run that goes on, or another student, learns from the same ones. This file does not know
students.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.api import LLM
from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.prompts import Document
from jaxinfer.request import FinishReason, Request, SamplingParams
from jaxinfer.train.rows import Text

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """max_tokens: of an answer. held_out: share of the lines. seed: of the choice of lines and of the answers. learn: "completion", or
    "all" to learn the prompts' tokens too."""

    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.7)
    held_out: float = 0.1
    seed: int = 0
    learn: str = "completion"

    def __post_init__(self) -> None:
        if self.max_tokens < 8:
            raise ConfigError(f"--max-tokens {self.max_tokens} is below 8: too short an answer to draft for")
        if not self.temperatures or not all(0 <= value <= 2 for value in self.temperatures):
            raise ConfigError("--temperatures: give numbers from 0 to 2, for example 0,0.7")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out {self.held_out:g} is not in (0, 1); 0.1 keeps every tenth line for measuring")


class Texts(NamedTuple):
    """What is learned, and what is measured. cut: tokens of completions that did not fit."""

    train: tuple[Text, ...]
    held_out: tuple[Text, ...]
    cut: int = 0


def split(documents: Sequence[Document], wanted: Wanted) -> tuple[list[Document], list[Document]]:
    """The lines to learn from and those held out, chosen by the seed.

    Raises:
        ConfigError: fewer than two lines.
    """
    if len(documents) < 2:
        raise ConfigError("--data holds one prompt; at least two are needed: one is held out to measure on")
    count = min(max(round(wanted.held_out * len(documents)), 1), len(documents) - 1)
    order = np.random.default_rng(wanted.seed).permutation(len(documents))
    held = {int(number) for number in order[:count]}
    kept = [document for number, document in enumerate(documents) if number not in held]
    return kept, [documents[number] for number in sorted(held)]


class Asked(NamedTuple):
    """Lines to learn from, and those to measure on."""

    learned: Sequence[Document]
    held_out: Sequence[Document]


def make(config: EngineConfig, asked: Asked, wanted: Wanted, progress: Progress) -> Texts:
    """All texts; the target is opened and closed. What is held out is answered once at each different temperature.

    Raises:
        ConfigError, CheckpointError: the target cannot be opened. RuntimeError: an answer ended with an error.
    """
    given = [Text((*it.prompt, *it.completion), len(it.prompt)) for it in asked.learned if it.completion]
    open_ended = [it for it in asked.learned if not it.completion]
    requests = requests_of("learn", open_ended, wanted, wanted.temperatures)
    count = len(requests)
    requests += requests_of("held", asked.held_out, wanted, tuple(dict.fromkeys(wanted.temperatures)))
    with LLM.build(config, progress=progress) as llm:
        answered = answers(llm, requests, progress)
    return Texts((*given, *answered[:count]), tuple(answered[count:]), sum(it.cut for it in asked.learned))


def requests_of(name: str, documents: Sequence[Document], wanted: Wanted, temperatures: Sequence[float]) -> list[Request]:
    """One for each prompt and temperature, each with a seed of its own."""
    requests = []
    for document in documents:
        for number, temperature in enumerate(temperatures):
            seed = (wanted.seed * 1_000_003 + document.line) * 64 + number
            params = SamplingParams.of(temperature=temperature, max_tokens=min(wanted.max_tokens, document.room), seed=seed % 2**63)
            requests.append(Request(f"{name}-{document.line}-{number}", document.prompt, params))
    return requests


def answers(llm: Any, requests: Sequence[Request], progress: Progress) -> list[Text]:
    """What the target says to each, with the token that ended it.

    Raises:
        RuntimeError: an answer ended with an error.
    """
    found = []
    for request, made in zip(requests, llm.complete(requests), strict=True):
        if made.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"{request.id}: {made.error}")
        tokens, params = (*request.prompt, *made.token_ids), request.params
        found.append(Text(tokens, len(request.prompt), params.temperature, params.seed or 0))
        progress("answer", len(found), len(requests))
    return found


def write(path: Path, texts: Texts, about: Mapping[str, Any]) -> None:
    """Keep texts in a file, which is there whole or not at all. about: what they depend on."""
    partial = path.with_suffix(".partial")
    values = {"about": about, "train": texts.train, "held_out": texts.held_out, "cut": texts.cut}
    partial.write_text(json.dumps(values, separators=(",", ":")), encoding="utf-8")
    Path(partial).replace(path)


def read(path: Path, about: Mapping[str, Any]) -> Texts:
    """The texts of a file.

    Raises:
        CheckpointError: it is damaged, or its texts are not those of this target, these lines and these settings.
    """
    try:
        found = read_json(path)
        known, wanted = found["about"], json.loads(json.dumps(about))
        if differs := sorted(name for name in known.keys() | wanted.keys() if known.get(name) != wanted.get(name)):
            raise CheckpointError(f"{path}: these texts were made with another {', '.join(differs)}; name another file, or remove it")
        train, held_out = (tuple(Text(tuple(tokens), *rest) for tokens, *rest in found[name]) for name in ("train", "held_out"))
        return Texts(train, held_out, int(found["cut"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise broken(path, "texts as `distill` keeps them", str(error), remedy="remove the folder and begin anew") from None
