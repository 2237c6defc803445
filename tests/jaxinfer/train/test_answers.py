"""Lines are held out by the seed; prompts are answered at each temperature, completions taken as they are; texts are kept whole."""

from types import SimpleNamespace

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.prompts import Document
from jaxinfer.request import FinishReason
from jaxinfer.train import answers
from jaxinfer.train.answers import Asked, Texts, Wanted
from jaxinfer.train.rows import Text


class Echo:
    """Answers each prompt with its first token and a mark; notes what it was asked."""

    def __init__(self, reason=FinishReason.STOP):
        self.asked, self.reason = [], reason

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def complete(self, requests):
        for request in requests:
            self.asked.append(request)
            yield SimpleNamespace(token_ids=(request.prompt[0], 99), finish_reason=self.reason, error="broken")


def documents(count, given=()):
    return [Document(n + 1, "", None, (n, n), (7, 8) if n in given else (), 20) for n in range(count)]


def test_a_share_is_held_out():
    kept, held = answers.split(documents(20), Wanted(held_out=0.2))
    assert len(held) == 4 and sorted(it.line for it in [*kept, *held]) == list(range(1, 21))
    assert answers.split(documents(20), Wanted(held_out=0.2)) == (kept, held) != answers.split(documents(20), Wanted(held_out=0.2, seed=1))
    assert [len(part) for part in answers.split(documents(2), Wanted(held_out=0.9))] == [1, 1]
    with pytest.raises(ConfigError, match="at least two"):
        answers.split(documents(1), Wanted())


def test_texts_are_answers_or_completions(monkeypatch):
    echo, told = Echo(), []
    monkeypatch.setattr(answers.LLM, "build", lambda config, progress: echo)
    wanted = Wanted(max_tokens=9, temperatures=(0.0, 0.5), held_out=0.25)
    kept, held = answers.split(documents(8, given=range(4)), wanted)
    made = answers.make(EngineConfig(), Asked(kept, held), wanted, lambda *report: told.append(report))
    given = [it for it in kept if it.completion]
    assert made.train[: len(given)] == tuple(Text((*it.prompt, 7, 8), 2) for it in given)
    assert len(made.train) == len(given) + 2 * (len(kept) - len(given)) and len(made.held_out) == 2 * len(held)
    assert all(text.tokens == (text.tokens[0],) * 3 + (99,) and text.first == 2 for text in made.held_out)
    assert [text.temperature for text in made.held_out] == [0.0, 0.5] * len(held)
    assert len({request.params.seed for request in echo.asked}) == len(echo.asked) == told[-1][1] == told[-1][2]
    assert [text.seed for text in made.held_out] == [request.params.seed for request in echo.asked[-2 * len(held) :]]
    assert all(request.params.max_tokens == 9 for request in echo.asked)
    several = Wanted(temperatures=(0.5, 0.5, 0.0))
    everything = answers.make(EngineConfig(), Asked(documents(3), documents(2)), several, lambda *_: None)
    assert {text.first for text in (*everything.train, *everything.held_out)} == {2}
    assert len({text.seed for text in everything.train}) == 9 and [text.temperature for text in everything.held_out] == [0.5, 0.0] * 2
    assert len({request.id for request in echo.asked[-13:]}) == 13


def test_an_answer_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="learn-1-0: broken"):
        answers.answers(Echo(FinishReason.ERROR), answers.requests_of("learn", documents(1), Wanted(), (0.0,)), lambda *_: None)


def test_texts_are_kept(tmp_path):
    texts = Texts((Text((1, 2, 3), 1),), (Text((4, 5), 1, 0.5, 2**40),), 3)
    answers.write(tmp_path / "texts.json", texts, {"data": ("a", None)})
    assert answers.read(tmp_path / "texts.json", {"data": ("a", None)}) == texts
    assert [path.name for path in tmp_path.iterdir()] == ["texts.json"]
    with pytest.raises(CheckpointError, match="made with another data, dtype;"):
        answers.read(tmp_path / "texts.json", {"data": ("b", None), "dtype": "float32"})
    for damaged in ('{"about": {}, "train": [[1]], "held_out": []}', '{"train": [], "held_out": []}', '{"about": 1}'):
        (tmp_path / "texts.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="begin anew"):
            answers.read(tmp_path / "texts.json", {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"max_tokens": 7}, "--max-tokens 7"), ({"temperatures": ()}, "--temperatures"), ({"temperatures": (0.0, -1.0)}, "--temperatures"),
     ({"held_out": 1.0}, "--held-out 1")],
)  # fmt: skip
def test_what_makes_no_sense(changes, said):
    with pytest.raises(ConfigError, match=said):
        Wanted(**changes)
