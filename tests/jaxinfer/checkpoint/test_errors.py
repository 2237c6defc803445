"""The message names file, tensor, expected, found and what to do, and stays short."""

from pathlib import Path

from jaxinfer.checkpoint.errors import CheckpointError, broken


def test_the_message():
    error = broken(Path("m/a.safetensors"), "shape [2]", [3], tensor="w", remedy="fetch it again")
    assert isinstance(error, CheckpointError)
    assert str(error) == "m/a.safetensors: tensor 'w': expected shape [2], found [3]; fetch it again"
    assert str(broken("config.json", "JSON", "nothing")) == "config.json: expected JSON, found nothing"


def test_what_was_found_is_cut_short():
    assert len(str(broken("a", "b", "x" * 10_000))) < 200
