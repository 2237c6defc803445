"""Text of one sequence: pieces joined are the whole text cut at the stop string, whatever way the tokens fell."""

import random

import pytest

from jaxinfer.engine.text import OutputText
from jaxinfer.request import StopRules
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Pieces:
    """A detokeniser whose tokens are given texts; it holds one back while it ends with '~', as if a character were incomplete."""

    def __init__(self, texts):
        self.texts, self.held = texts, ""

    def push(self, token):
        text = self.held + self.texts[token]
        self.held, text = (text, "") if text.endswith("~") else ("", text)
        return text.replace("~", "")

    def flush(self):
        text, self.held = self.held.replace("~", "?"), ""
        return text


def of(texts, stop=(), *, include=False):
    # a stand-in detokeniser: OutputText only pushes to it and flushes it
    text = OutputText(None, StopRules(tuple(stop), (), include))
    text._detokenizer = Pieces(texts)
    return text


def run(texts, stop=(), *, include=False, free=0):
    """Push tokens until one stops the sequence, flush otherwise; `free` tokens may not stop it. Returns the pieces and what stopped it."""
    text, pieces = of(texts, stop, include=include), []
    for token in range(len(texts)):
        piece = text.push(token, may_stop=token >= free)
        pieces.append(piece.text)
        if piece.stopped_by:
            return pieces, piece.stopped_by
    rest = text.flush()
    return [*pieces, rest.text], rest.stopped_by


@pytest.mark.parametrize(
    ("texts", "stop", "pieces", "stopped_by"),
    [
        (["ab", "cd"], (), ["ab", "cd", ""], None),
        (["ab", "END", "cd"], ("END",), ["ab", ""], "END"),
        (["ab", "E", "N", "D"], ("END",), ["ab", "", "", ""], "END"),
        (["abE", "NDcd"], ("END",), ["ab", ""], "END"),
        (["abEN", "x", "E"], ("END",), ["ab", "ENx", "", "E"], None),
        (["aab", "aac"], ("aac",), ["aab", ""], "aac"),
        (["aaa", "b"], ("aab",), ["a", ""], "aab"),
        (["x", "END"], ("END", "ND"), ["x", ""], "END"),
        (["xEND"], ("ND", "END!"), ["xE"], "ND"),
        (["one two three"], ("three", "two"), ["one "], "two"),
        (["abab"], ("ab", "abab"), [""], "abab"),
        (["\n", "\n", "x"], ("\n\n",), ["", ""], "\n\n"),
        (["é", "~", "x"], (), ["é", "", "x", ""], None),
        (["a", "b~"], (), ["a", "", "b?"], None),
        (["a", "?~"], ("??",), ["a", "", ""], "??"),
        ([""], ("x",), ["", ""], None),
    ],
)
def test_stop_strings_split_over_tokens(texts, stop, pieces, stopped_by):
    assert run(texts, stop) == (pieces, stopped_by)


def test_the_stop_string_is_kept_when_wanted():
    assert run(["ab", "EN", "Dcd"], ("END",), include=True) == (["ab", "", "END"], "END")


def test_stop_strings_pass_while_they_do_not_count():
    assert run(["END", "END", "x", "END"], ("END",), free=2) == (["END", "END", "x", ""], "END")
    assert run(["E", "N", "D", "x"], ("END",), free=4) == (["", "", "END", "x", ""], None)


def test_text_that_passed_never_counts_later():
    assert run(["END", "x"], ("END",), free=1) == (["END", "x", ""], None)


def test_flushing_twice_gives_nothing_more():
    text = of(["abEN"], ("END",))
    assert text.push(0, may_stop=True).text == "ab"
    assert text.flush() == ("EN", None)
    assert text.flush() == ("", None)


def test_without_a_detokeniser_there_is_no_text():
    text = OutputText(None, StopRules(("x",)))
    assert text.push(5, may_stop=True) == ("", None)
    assert text.flush() == ("", None)


def first_stop(text, stops):
    """The slow twin: the text before the stop string that is complete first (the leftmost, then the longest, of those)."""
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), -len(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)[0]], min(found)[2]
    return text, None


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_of_any_text_streams_the_same(seed):
    draw = random.Random(seed)
    for _ in range(400):
        text = "".join(draw.choice("aab\n") for _ in range(draw.randint(0, 14)))
        stops = tuple({"".join(draw.choice("aab\n") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(0, 3))})
        pieces, stopped_by = run(list(text), stops)
        assert ("".join(pieces), stopped_by) == first_stop(text, stops), (text, stops)
        cuts, rest = [], text
        while rest:
            size = draw.randint(1, 4)
            cuts.append(rest[:size])
            rest = rest[size:]
        pieces, stopped_by = run(cuts, stops)
        whole = "".join(pieces)
        assert text.startswith(whole)
        assert not any(stop in whole for stop in stops)
        assert (whole == text) == (stopped_by is None)


@pytest.mark.parametrize("seed", range(4))
def test_real_tokens_stream_to_the_plain_text(seed):
    draw = random.Random(seed)
    for _ in range(50):
        plain = "".join(draw.choice("abé€😀👩‍👩‍👧 \n") for _ in range(draw.randint(0, 12)))
        tokens = TOKENIZER.encode(plain)
        text = OutputText(TOKENIZER.stream(skip_special=True), StopRules(("zz", "😀!")))
        pieces = [text.push(token, may_stop=True).text for token in tokens]
        assert "".join(pieces) + text.flush().text == plain
        assert all("\ufffd" not in piece for piece in pieces)
