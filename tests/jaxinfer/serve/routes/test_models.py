"""GET /v1/models."""

import openai
import pytest

from tests.fakes import LiveServer


def test_the_one_model(client, live):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    card = listed["data"][0]
    assert card == client.get("/v1/models/fake").json()
    assert {"id", "object", "created", "owned_by", "max_model_len"} <= set(card)
    assert card["max_model_len"] == 256


@pytest.mark.parametrize("name", ["other", "..", "a/b", "%2e%2e%2fetc%2fpasswd", "fake2"])
def test_other_names(client, fault, name):
    fault(client.get("/v1/models/" + name), 404)


def test_a_served_name_is_the_only_name():
    with LiveServer(served_model_name="org/nice") as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x") as official:
        assert official.models.list().data[0].id == "org/nice"
        assert official.models.retrieve("org/nice").id == "org/nice"
        with pytest.raises(openai.NotFoundError):
            official.completions.create(model="fake", prompt="a")
        assert official.completions.create(model="org/nice", prompt="a").model == "org/nice"
