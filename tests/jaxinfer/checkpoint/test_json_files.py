"""JSON files are read strictly."""

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.json_files import read_json


def test_reads_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"size": 3, "nested": {"é": [1.5, null, true]}}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"size": 3, "nested": {"é": [1.5, None, True]}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "expected JSON, found JSONDecodeError"),
        (b'{"a": 1', "expected JSON"),
        (b'{"a": 1,}', "expected JSON"),
        (b"\xff\xfe{}", "UnicodeDecodeError"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "found NoneType"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' stands twice"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
    ],
)
def test_names_what_is_wrong(raw, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON file, found No such file"):
        read_json(tmp_path / "config.json")
