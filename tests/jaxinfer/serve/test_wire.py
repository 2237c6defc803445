"""The framing of events and the keys of answers."""

import json

import msgspec

from jaxinfer.serve import wire


def test_events_are_framed():
    assert wire.event({"a": 1}) == b'data: {"a":1}\n\n'
    assert wire.event(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert wire.DONE == b"data: [DONE]\n\n"


def test_usage_stands_in_a_chunk_only_when_it_was_asked_for():
    chunk = wire.ChatChunk("id", 1, "m", [wire.ChatChunkChoice(0, wire.Delta())])
    assert "usage" not in json.loads(msgspec.json.encode(chunk))
    chunk.usage = None
    assert json.loads(msgspec.json.encode(chunk))["usage"] is None
    assert json.loads(msgspec.json.encode(chunk))["choices"][0]["delta"] == {}


def test_required_keys_are_there():
    choice = wire.ChatChoice(0, wire.ChatMessage("text"), None, "stop")
    read = json.loads(msgspec.json.encode(choice))
    assert {"finish_reason", "index", "message", "logprobs"} <= set(read)
    assert read["message"] == {"role": "assistant", "content": "text", "refusal": None}
    assert json.loads(msgspec.json.encode(wire.CompletionChoice(0, "x")))["logprobs"] is None
