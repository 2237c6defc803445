"""One audit from prompts to figures: the unquantised model stays loaded, schemes come one after another beside it.

For each scheme an engine is opened, both models answer every prompt greedily, both read the same texts (`forced.py`), and both are timed
in turn; then the scheme's engine goes. Two models are on the device at a time. Engines are no larger than the prompts need. This file
does not know flags, files or how results are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxinfer.api import LLM, Completion
from jaxinfer.audit import forced, generation, statistics
from jaxinfer.audit.forced import Text
from jaxinfer.audit.report import Likely, Reference, Scheme, Sizes, Worst
from jaxinfer.audit.statistics import Estimate, Trace
from jaxinfer.audit.task import Metric, Score, score
from jaxinfer.config import EngineConfig, from_arguments
from jaxinfer.console import StageBar, remark
from jaxinfer.prompts import Document
from jaxinfer.tokenizer import Tokenizer

SEQUENCES = 16  # at once, unless the user says how many
SHARE = 0.45  # of the memory, for each of the two engines
WORST, WORST_PER_DOCUMENT, CONTEXT = 6, 2, 64  # tokens shown, of one document at most, tokens before each


@dataclass(frozen=True)
class Options:
    """What the user chose. max_tokens: of greedy outputs. whole: score the prompts' tokens too. repeat: timed turns."""

    max_tokens: int
    max_kl: float
    whole: bool
    repeat: int
    seed: int
    metric: Metric | None


@dataclass(frozen=True)
class Basis:
    """What every scheme is compared with: the open unquantised model and what it said."""

    llm: LLM
    documents: tuple[Document, ...]
    outputs: tuple[Completion, ...]
    texts: tuple[Text, ...]
    numbers: tuple[float, ...]
    options: Options


def settings(values: Mapping[str, Any], changes: Mapping[str, Any], documents: Sequence[Document], max_tokens: int) -> EngineConfig:
    """An engine's settings for these documents: what the user gave, then sizes that suffice, then the scheme's own."""
    longest = max(len(it.prompt) + max(len(it.completion), min(max_tokens, it.room)) for it in documents)
    sizes = {"max_model_len": max(longest, 2), "max_sequences": min(SEQUENCES, len(documents)), "memory_fraction": SHARE}
    return from_arguments(EngineConfig, {**sizes, **values, **changes})


def open_engine(config: EngineConfig) -> LLM:
    """A model, ready."""
    with StageBar() as bar:
        return LLM.build(config, progress=bar)


def begin(llm: LLM, documents: Sequence[Document], options: Options) -> Basis:
    """Let the unquantised model answer every prompt and settle what is scored: the user's completions, or else its own answers."""
    remark(f"unquantised: {len(documents)} greedy outputs")
    outputs = generation.greedy(llm, documents, options.max_tokens)
    texts = []
    for document, made in zip(documents, outputs, strict=True):
        follows = document.completion or made.token_ids
        texts.append(Text((*document.prompt, *follows), 1 if options.whole else len(document.prompt)))
    numbers = () if options.metric is None else options.metric(_records(documents, outputs))
    return Basis(llm, tuple(documents), tuple(outputs), tuple(texts), numbers, options)


def judge(basis: Basis, name: str, llm: LLM, context: int) -> tuple[Scheme, list[Trace]]:
    """Everything about one scheme, whose engine is open, and what both models thought of each token."""
    options, documents = basis.options, basis.documents
    remark(f"{name}: greedy outputs")
    outputs = generation.greedy(llm, documents, options.max_tokens)
    remark(f"{name}: {sum(len(text.tokens) - text.first for text in basis.texts)} tokens through both models")
    traces = forced.compare(basis.llm.engine.program, llm.engine.program, basis.texts)
    remark(f"{name}: {options.repeat} timed turns")
    speed = generation.race(basis.llm, llm, documents, options.max_tokens, options.repeat)
    found = statistics.divergence(traces, options.seed)
    metric = options.metric
    made = Scheme(
        name=name,
        within=found.not_finite == 0 and found.mean.value <= options.max_kl,
        divergence=found,
        flips=statistics.flips(traces),
        perplexity=statistics.perplexity([trace.other for trace in traces], options.seed),
        perplexity_ratio=statistics.perplexity_ratio(traces, options.seed),
        agreement=statistics.agreement([it.token_ids for it in basis.outputs], [it.token_ids for it in outputs]),
        sizes=sizes(llm, context),
        task=None if metric is None else score(metric(_records(documents, outputs)), basis.numbers),
        speed=speed,
        worst=worst(basis, traces),
    )
    return made, traces


def reference(basis: Basis, traces: Sequence[Trace], context: int) -> Reference:
    """The unquantised model's own figures, from any scheme's traces."""
    own = Estimate(float("nan")) if not traces else statistics.perplexity([trace.reference for trace in traces], basis.options.seed)
    task: Score | None = score(basis.numbers, basis.numbers) if basis.numbers else None
    return Reference(own, sizes(basis.llm, context), task)


def sizes(llm: LLM, context: int) -> Sizes:
    """Bytes of weights and of a token's keys and values. context: tokens that the model was made for."""
    config = llm.engine.program.config
    page = replace(config, pool=replace(config.pool, pages=1))
    kv = sum(spec.nbytes for spec in jax.tree.leaves(page.kv_specs))
    return Sizes(config.graph.nbytes, kv // page.pool.page_size, context)


def worst(basis: Basis, traces: Sequence[Trace]) -> tuple[Worst, ...]:
    """The tokens with the largest divergence, few of each document."""
    found = []
    for number, trace in enumerate(traces):
        values = np.where(np.isfinite(trace.divergence), trace.divergence, np.inf)
        found += [(float(values[at]), number, int(at)) for at in np.argsort(-values)[:WORST_PER_DOCUMENT]]
    return tuple(_worst(basis, traces[number], number, at) for _, number, at in sorted(found, reverse=True)[:WORST])


def _worst(basis: Basis, trace: Trace, number: int, at: int) -> Worst:
    tokenizer, tokens, place = basis.llm.tokenizer, basis.texts[number].tokens, trace.first + at
    before = tokenizer.decode(tokens[max(place - CONTEXT, 0) : place], skip_special=False)
    return Worst(
        line=basis.documents[number].line, position=place, divergence=float(trace.divergence[at]), context=before,
        token=tokenizer.token_text(tokens[place]),
        reference=_likely(tokenizer, trace.reference_top[at], trace.reference_top_logprobs[at]),
        other=_likely(tokenizer, trace.other_top[at], trace.other_top_logprobs[at]),
    )  # fmt: skip


def _likely(tokenizer: Tokenizer, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[Likely, ...]:
    return tuple(
        Likely(tokenizer.token_text(int(token)), float(np.exp(value))) for token, value in zip(tokens, logprobs, strict=True)
    )  # fmt: skip


def _records(documents: Sequence[Document], outputs: Sequence[Completion]) -> list[dict[str, str | None]]:
    return [
        {"prompt": document.prompt_text, "completion": document.given, "output": made.text}
        for document, made in zip(documents, outputs, strict=True)
    ]
