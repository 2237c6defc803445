"""A draft begins where it was, is refused where it cannot learn or be served, and is saved as a model."""

import json
import shutil

import numpy as np
import pytest

from jaxinfer.checkpoint import manifest
from jaxinfer.config import ConfigError
from jaxinfer.train import draft
from tests.jaxinfer.train.conftest import SMALL, teacher_of


def test_what_is_saved_is_where_it_begins(target, small, tmp_path):
    teacher = teacher_of(target)
    drawn = draft.student(str(small), teacher, 3)
    weights = drawn.begin()
    assert set(weights) == set(drawn.specs) and drawn.folder is None and not np.array_equal(
        weights["embedding.weight"], draft.student(str(small), teacher, 4).begin()["embedding.weight"]
    )  # fmt: skip
    manifest.write(tmp_path, drawn.save(tmp_path, weights))
    again = draft.student(str(tmp_path), teacher, 0)
    assert again.config == json.loads(small.read_text()) and (tmp_path / "tokenizer.json").is_file()
    assert all(np.array_equal(weights[name], values) for name, values in again.begin().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"vocab_size": 300}, "vocabulary has 300 tokens, the target's 272"), ({"quantization_config": {"a": 1}}, "are quantised")],
)
def test_drafts_that_cannot_be(target, tmp_path, changes, said):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    with pytest.raises(ConfigError, match=said):
        draft.student(str(tmp_path / "config.json"), teacher_of(target), 0)


def test_another_tokenizer_is_refused(target, tmp_path):
    shutil.copytree(target, tmp_path / "other")
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    names = list(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {name: number for number, name in enumerate(reversed(names))}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="has another tokenizer than target"):
        draft.student(str(tmp_path / "other"), teacher_of(target), 0)
