"""Grammars while sequences run: the cache, masks against a slow reference, the end of a text."""

import threading

import numpy as np
import pytest

from jaxinfer.engine.grammar import Grammars, masks
from jaxinfer.engine.grammar_compile import GrammarProblem
from jaxinfer.errors import RequestError
from jaxinfer.grammar import Grammar
from jaxinfer.sampling import ALL_ALLOWED, mask_words
from jaxinfer.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer
from tests.jaxinfer.engine.test_grammar_trial import HOSTILE

BYTES = byte_tokenizer()
EOS = BYTES.eos_ids[0]
CHOICES = ["red", "redder", "réd", "blue\n", "r"]


@pytest.fixture(scope="module")
def grammars():
    grammars = Grammars(BYTES, 300, seconds=0.5, kept=8)
    yield grammars
    grammars.close()


def allowed(matcher, vocab=300):
    row = np.zeros(mask_words(vocab), np.uint32)
    matcher.fill(row)
    return {i for i in range(32 * len(row)) if row[i // 32] >> np.uint32(i % 32) & np.uint32(1)}


def reference(done):
    """Tokens that lead to one of the choices, by trying each token's bytes on each choice."""
    rests = [choice.encode()[len(done) :] for choice in CHOICES if choice.encode().startswith(done)]
    texts = {token: BYTES.token_bytes(token) for token in range(256)}
    return {token for token, text in texts.items() if any(rest.startswith(text) for rest in rests)} | ({EOS} if b"" in rests else set())


def test_masks_are_those_of_a_slow_reference(grammars):
    """Along every path; the model has 300 ids, the tokenizer 262: those beyond are never allowed."""
    for choice in CHOICES:
        matcher, done = grammars.matcher(Grammar.choice(CHOICES)), b""
        for byte in choice.encode():
            assert allowed(matcher) == reference(done)
            matcher.accept(next(t for t in range(256) if BYTES.token_bytes(t) == bytes([byte])))
            done += bytes([byte])
        assert allowed(matcher) == reference(done) >= {EOS}


@pytest.mark.parametrize("vocab", [262, 256, 300, 40])
def test_vocabularies_of_other_sizes(vocab):
    grammars = Grammars(BYTES, vocab)
    ascii_tokens = {token for token in range(256) if BYTES.token_bytes(token) < b"\x80"}
    matcher = grammars.matcher(Grammar.regex(r"[\x00-\x7f]*"))
    assert allowed(matcher, vocab) == {token for token in ascii_tokens | {EOS} if token < vocab}
    grammars.close()


def test_the_end(grammars):
    ended = grammars.matcher(Grammar.regex("ab?"))
    a, b = BYTES.encode("ab", special=False)
    assert not ended.finished and EOS not in allowed(ended)
    ended.accept(a)
    assert allowed(ended) == {b, EOS} and not ended.finished
    ended.accept(b)
    assert ended.finished and allowed(ended) == {EOS}
    other = grammars.matcher(Grammar.regex("ab?"))
    other.accept(a)
    other.accept(EOS)
    assert other.finished


def test_a_token_outside_breaks_that_matcher_alone(grammars):
    broken, fine = (grammars.matcher(Grammar.regex("ab")) for _ in range(2))
    with pytest.raises(GrammarProblem):
        broken.accept(BYTES.encode("z", special=False)[0])
    assert len(allowed(broken)) == 32 * mask_words(300), "all bits: the row is lost, the sampler must not be"
    assert allowed(fine) == set(BYTES.encode("a", special=False))
    with pytest.raises(GrammarProblem):
        broken.accept(EOS)


def test_masks_of_a_step(grammars):
    assert masks({}, (4, 1), 300) is None
    mask = masks({2: (grammars.matcher(Grammar.regex("a")), ())}, (4, 1), 300)
    assert mask.shape == (4, mask_words(300)) and mask.dtype == np.uint32
    assert (mask[[0, 1, 3]] == ALL_ALLOWED).all() and mask[2].sum() < ALL_ALLOWED


def test_masks_along_drafts_leave_the_matcher_where_it_is(grammars):
    matcher = grammars.matcher(Grammar.regex("abc?"))
    a, b, c = BYTES.encode("abc", special=False)
    sets = lambda mask: [set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()) for row in mask]
    anything = len(sets(np.full((1, mask_words(300)), ALL_ALLOWED))[0])
    for drafts, wanted in (
        ((a, b, c), [{a}, {b}, {c, EOS}, {EOS}]), ((a, c, c), [{a}, {b}, None, None]), ((), [{a}, None, None, None]),
        ((a, b, EOS), [{a}, {b}, {c, EOS}, None]),
    ):  # fmt: skip
        found = sets(masks({0: (matcher, drafts)}, (1, 4), 300))
        for tokens, expected in zip(found, wanted, strict=True):
            assert tokens == expected or (expected is None and (len(tokens) == anything or tokens == {EOS})), drafts
    matcher.accept(a)
    assert allowed(matcher) == {b}


def test_the_cache_is_bounded_and_keeps_the_latest(grammars):
    for i in range(20):
        grammars.compile(Grammar.regex(f"a{{{i + 1}}}"))
        grammars.compile(Grammar.regex("kept"))
    assert len(grammars._found) == 8 and Grammar.regex("kept") in grammars._found and Grammar.regex("a{20}") in grammars._found


def test_a_hostile_grammar_is_refused_in_time_and_remembered(grammars, monkeypatch):
    for _ in range(2):
        with pytest.raises(RequestError, match="too complex") as caught:
            grammars.compile(HOSTILE)
        assert caught.value.param == "grammar"
        monkeypatch.setattr(grammars, "_compiled", None)
    with pytest.raises(RequestError, match="too complex"):
        grammars.matcher(HOSTILE)


def test_nobody_waits_behind_a_hostile_grammar_for_one_that_is_ready(grammars):
    def compile_hostile():
        with pytest.raises(RequestError):
            grammars.compile(Grammar.lark(HOSTILE.text + "\n"))

    grammars.compile(Grammar.regex("ready"))
    slow = threading.Thread(target=compile_hostile)
    slow.start()
    grammars.matcher(Grammar.regex("ready"))
    assert slow.is_alive()
    slow.join()


def test_models_that_cannot_have_grammars():
    bare = Tokenizer(BYTES._core, {})
    for tokenizer in (None, bare):
        with pytest.raises(RequestError, match="end-of-sequence"):
            Grammars(tokenizer, 300).compile(Grammar.json_object())
