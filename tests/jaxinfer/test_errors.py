"""Refusals carry the name of the field."""

from jaxinfer.errors import RequestError
from jaxinfer.request import QueueFull


def test_a_refusal_names_its_field():
    assert (str(RequestError("too long", "prompt")), RequestError("too long", "prompt").param) == ("too long", "prompt")
    assert isinstance(QueueFull("later"), RequestError) and QueueFull("later").param is None
