"""One audit on a tiny model: what is scored, what both models said, and figures that hang together."""

import numpy as np
import pytest

from jaxinfer.audit import session, statistics
from jaxinfer.audit.session import Options
from jaxinfer.config import ModelConfig
from tests.jaxinfer.audit.conftest import LAYERS, MAX_TOKENS


def test_engines_are_no_larger_than_the_documents_need(basis):
    longest = max(len(it.prompt) + max(len(it.completion), MAX_TOKENS) for it in basis.documents)
    made = session.settings({"model": "m", "data": "x"}, {"quantize": "int8"}, basis.documents, MAX_TOKENS)
    assert made.model == ModelConfig("m", quantize="int8", max_model_len=longest)
    assert (made.scheduler.max_sequences, made.cache.memory_fraction) == (3, session.SHARE)
    assert session.settings({"max_sequences": 2, "max_model_len": 50}, {}, basis.documents, 4).scheduler.max_sequences == 2


def test_the_users_completion_is_scored_and_else_the_models_own(basis):
    given, own, other = basis.texts
    assert given.tokens == basis.documents[0].prompt + basis.documents[0].completion and given.first == len(basis.documents[0].prompt)
    for text, document, made in ((own, *basis.documents[1:2], basis.outputs[1]), (other, *basis.documents[2:], basis.outputs[2])):
        assert text.tokens == document.prompt + made.token_ids and 1 <= len(made.token_ids) <= MAX_TOKENS


def test_prompts_are_scored_too_if_asked(engines, basis):
    whole = session.begin(engines[None], basis.documents[:1], Options(MAX_TOKENS, 0.02, True, 0, 0, None))
    assert whole.texts[0].first == 1


def test_figures_are_those_of_the_traces(basis, judged):
    scheme, traces = judged
    divergence = np.concatenate([trace.divergence for trace in traces])
    assert scheme.name == "int8" and len(divergence) == scheme.divergence.tokens == sum(len(t.tokens) - t.first for t in basis.texts)
    assert scheme.divergence.mean.value == pytest.approx(divergence.mean(), rel=1e-5) and scheme.divergence.mean.value > 1e-6
    assert scheme.within == (scheme.divergence.mean.value <= 0.02)
    assert scheme.perplexity == statistics.perplexity([trace.other for trace in traces], 0)
    assert session.reference(basis, traces, 64).perplexity == statistics.perplexity([trace.reference for trace in traces], 0)
    assert scheme.speed.reference > 0 and scheme.speed.turns == (pytest.approx(scheme.speed.ratio),)


def test_the_models_own_greedy_tokens_are_its_likeliest(basis, judged):
    for trace, made in zip(judged[1][1:], basis.outputs[1:], strict=True):
        assert trace.reference_top[:, 0].tolist() == list(made.token_ids)


def test_sizes(basis, judged):
    plain, quantised = session.sizes(basis.llm, 64), judged[0].sizes
    assert plain.weights == 4 * basis.llm.engine.info.parameters and quantised.weights < plain.weights
    assert plain.kv_per_token == LAYERS * 2 * 2 * 8 * 4  # layers, keys and values, heads, features, bytes
    assert plain.whole == plain.weights + 64 * plain.kv_per_token


def test_the_worst_tokens_come_with_what_stood_before(basis, judged):
    worst = judged[0].worst
    values = [item.divergence for item in worst]
    assert values == sorted(values, reverse=True) and values[0] == judged[0].divergence.largest
    lines = [item.line for item in worst]
    assert max(map(lines.count, lines)) <= session.WORST_PER_DOCUMENT and set(lines) <= {1, 3, 5}
    first = next(item for item in worst if item.line == 1)
    text = "Once upon a time there was"
    at = first.position - (len(basis.documents[0].prompt) - len("Once upon a"))
    assert first.context.endswith(text[:at]) and first.token == text[at]
    assert len(first.reference) == 3 and first.reference[0].probability >= first.reference[1].probability
