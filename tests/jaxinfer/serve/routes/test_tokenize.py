"""POST /tokenize and /detokenize, GET /tokenizer_info."""

import pytest


def test_there_and_back(client):
    made = client.post("/tokenize", json={"prompt": "h€", "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) == 4
    assert made["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "h€"}
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_a_conversation(client, live):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert live.fake.tokenizer.decode(tokens, skip_special=False) == "<|user|>hi<|eos|><|assistant|>"
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "<|user|>hi<|eos|><|assistant|>"
    assert client.post("/detokenize", json={"tokens": tokens, "skip_special_tokens": True}).json()["prompt"] == "hi"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 1}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages"), ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
    ],
)  # fmt: skip
def test_refusals(client, fault, path, body, param):
    fault(client.post(path, json=body), 400, param)


def test_another_model_is_404(client, fault):
    fault(client.post("/tokenize", json={"prompt": "a", "model": "x"}), 404, "model")
    fault(client.post("/detokenize", json={"tokens": [1], "model": "x"}), 404, "model")


def test_info(client):
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert "add_generation_prompt" in info["chat_template"]
    assert info["vocab_size"] == 262
