"""From bodies to the engine's requests: defaults, limits, templates, ids."""

import pytest

from jaxinfer.request import FinishReason, Output, RequestError
from jaxinfer.serve import convert
from jaxinfer.serve.convert import Limits, Ready
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.schema import ChatBody, CompletionBody
from jaxinfer.tokenizer import TokenizerError
from tests.fakes import byte_tokenizer

LIMITS = Limits(vocab_size=262, max_model_len=64)
TOKENIZER = byte_tokenizer()
USER = [{"role": "user", "content": "hi"}]


def chat(**values):
    return ChatBody(messages=values.pop("messages", USER), **values)


def text(**values):
    return CompletionBody(prompt=values.pop("prompt", "hi"), **values)


def refusal(run, *values):
    with pytest.raises((ApiError, RequestError)) as caught:
        run(*values)
    error = caught.value
    return error.param if isinstance(error, RequestError) else error.body.param


def call(body):
    ready = convert.tokens_of_chat(body, TOKENIZER) if isinstance(body, ChatBody) else convert.tokens_of_prompts(body, TOKENIZER, LIMITS)
    return convert.build(body, ready, convert.sampling(body, {}, LIMITS), model="m", limits=LIMITS)


def test_request_over_model_over_openai():
    params = convert.sampling(text(temperature=0.1, stop="x", min_p=0.2), {"temperature": 0.7, "top_k": 5}, LIMITS)
    assert (params.temperature, params.top_k, params.min_p, params.top_p, params.stop.strings) == (0.1, 5, 0.2, 1.0, ("x",))
    assert convert.effective_defaults({"temperature": 0.7})["temperature"] == 0.7
    assert convert.effective_defaults({})["top_p"] == 1.0


def test_all_sampling_fields_arrive():
    body = chat(
        top_p=0.5, top_k=3, seed=-5, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, min_tokens=2, max_tokens=9,
        stop=["a", "b"], stop_token_ids=[7], include_stop_str_in_output=True, ignore_eos=True, skip_special_tokens=False, n=3,
        logit_bias={"5": -100, "6": 1.5}, logprobs=True, top_logprobs=4, bad_words=["no"], allowed_token_ids=[1, 2], prompt_logprobs=0,
    )  # fmt: skip
    params = convert.sampling(body, {}, LIMITS)
    assert (params.top_p, params.top_k, params.seed, params.presence_penalty, params.frequency_penalty) == (0.5, 3, -5, 1, -1)
    assert (params.repetition_penalty, params.min_tokens, params.max_tokens, params.n, params.logprobs) == (1.5, 2, 9, 3, 4)
    assert (params.stop.strings, params.stop.token_ids, params.stop.include_in_output, params.stop.ignore_eos) == (
        ("a", "b"),
        (7,),
        True,
        True,
    )
    assert (params.bad_words, params.allowed_token_ids, params.prompt_logprobs) == (("no",), (1, 2), 0)
    assert (dict(params.logit_bias), params.skip_special_tokens) == ({5: -100.0, 6: 1.5}, False)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"logit_bias": {"262": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"), ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"allowed_token_ids": [262]}, "allowed_token_ids"), ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"), ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop_token_ids": [262]}, "stop_token_ids"), ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"), ({"stop": "a" * 257}, "stop"), ({"n": 17}, "n"), ({"n": 0}, "n"), ({"best_of": 2}, "best_of"),
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -2}, "top_k"), ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"), ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"), ({"priority": 2**40}, "priority"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(values, param):
    assert refusal(convert.sampling, text(**values), {}, LIMITS) == param
    assert refusal(convert.sampling, chat(**values), {}, LIMITS) == param


def test_logprobs_of_both_kinds():
    assert convert.sampling(text(logprobs=0), {}, LIMITS).logprobs == 0
    assert convert.sampling(chat(logprobs=True), {}, LIMITS).logprobs == 0
    assert convert.sampling(chat(logprobs=False), {}, LIMITS).logprobs is None
    assert refusal(convert.sampling, text(logprobs=21), {}, LIMITS) == "logprobs"
    assert refusal(convert.sampling, chat(top_logprobs=2), {}, LIMITS) == "top_logprobs"
    assert refusal(convert.sampling, chat(logprobs=True, top_logprobs=21), {}, LIMITS) == "top_logprobs"
    assert convert.sampling(chat(top_logprobs=0), {}, LIMITS).logprobs is None


def test_an_echo_with_logprobs_scores_the_prompt():
    asked = lambda **values: convert.sampling(text(**values), {}, LIMITS).prompt_logprobs
    assert (asked(echo=True), asked(logprobs=2), asked(echo=True, logprobs=2), asked(prompt_logprobs=0)) == (None, None, 2, 0)
    assert asked(echo=True, logprobs=1, prompt_logprobs=5) == 5
    assert convert.sampling(chat(prompt_logprobs=3), {}, LIMITS).prompt_logprobs == 3
    assert refusal(convert.sampling, text(prompt_logprobs=1, stream=True), {}, LIMITS) == "prompt_logprobs"


def test_max_tokens_zero_is_for_scoring_alone():
    made = call(text(echo=True, logprobs=1, max_tokens=0))
    assert (made.scoring, made.sequences[0].params.max_tokens) == (True, 1)
    drawn = Output(made.sequences[0].id, text="x", token_ids=(1,), finish_reason=FinishReason.STOP, stop_reason="x", output_tokens=1)
    ((choice, shown),) = made.outputs([drawn])
    assert (choice, shown.text, shown.token_ids, shown.output_tokens) == (0, "", (), 0)
    assert (shown.finish_reason, shown.stop_reason) == (FinishReason.LENGTH, None)
    assert list(call(text(echo=True)).outputs([])) == []


def test_lengths():
    assert convert.sampling(chat(max_tokens=3, max_completion_tokens=5), {}, LIMITS).max_tokens == 5
    assert call(chat()).sequences[0].params.max_tokens is None
    assert call(text()).sequences[0].params.max_tokens == 16
    assert call(text(min_tokens=20)).sequences[0].params.max_tokens == 20
    assert call(text(prompt="a" * 60)).sequences[0].params.max_tokens == 4
    assert refusal(call, text(prompt="a" * 64)) == "prompt"
    assert refusal(call, text(max_tokens=63)) == "prompt"
    assert refusal(call, chat(messages=[{"role": "user", "content": "a" * 64}])) == "messages"
    assert refusal(call, text(prompt="")) == "prompt"
    assert refusal(call, text(prompt=[262])) == "prompt"
    assert refusal(call, text(prompt=[-1])) == "prompt"


def test_a_call_of_prompts_and_choices():
    made = call(text(prompt=["one", "two!"], n=2, seed=3, echo=True, best_of=2, priority=4, cache_salt="mine"))
    assert {request.cache_salt for request in made.sequences} == {"mine"}
    assert [(r.index, r.priority, TOKENIZER.decode(r.prompt)) for r in made.sequences] == [
        (0, 4, "one"), (1, 4, "one"), (0, 4, "two!"), (1, 4, "two!"),
    ]  # fmt: skip
    assert [made.index_of[r.key] for r in made.sequences] == [0, 1, 2, 3]
    assert [made.echo_of(i) for i in range(4)] == ["one", "one", "two!", "two!"]
    assert made.prompt_tokens == 7
    assert made.id.startswith("cmpl-")
    assert made.sequences[0].params.seed == 3 != made.sequences[1].params.seed
    assert call(chat()).id.startswith("chatcmpl-")


def test_echo_of_token_ids():
    assert convert.tokens_of_prompts(text(prompt=[[71, 72]], echo=True), TOKENIZER, LIMITS) == Ready(
        ((71, 72),), (TOKENIZER.decode([71, 72]),)
    )


def test_conversations_become_text():
    developer = [{"role": "developer", "content": "be kind"}, *USER]
    assert convert.render(chat(messages=developer), TOKENIZER) == "<|system|>be kind<|eos|><|user|>hi<|eos|><|assistant|>"
    assert convert.render(chat(add_generation_prompt=False), TOKENIZER) == "<|user|>hi<|eos|>"
    assert convert.render(chat(chat_template_kwargs={"prefix": "-"}), TOKENIZER) == "<|user|>-hi<|eos|><|assistant|>"
    silent = [*USER, {"role": "assistant", "content": None}]
    assert convert.render(chat(messages=silent), TOKENIZER).endswith("<|assistant|><|eos|><|assistant|>")


def test_the_final_message_can_be_continued():
    messages = [*USER, {"role": "assistant", "content": "Once upon "}]
    assert convert.render(chat(messages=messages, continue_final_message=True), TOKENIZER) == "<|user|>hi<|eos|><|assistant|>Once upon "
    both = chat(messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert refusal(convert.render, both, TOKENIZER) == "continue_final_message"
    empty = chat(messages=[*USER, {"role": "assistant", "content": " "}], continue_final_message=True)
    assert refusal(convert.render, empty, TOKENIZER) == "continue_final_message"


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt", "not a name", "self"])
def test_template_variables_that_are_taken(name):
    assert refusal(convert.render, chat(chat_template_kwargs={name: 1}), TOKENIZER) == "chat_template_kwargs"


def test_a_template_may_refuse():
    with pytest.raises(TokenizerError, match="no such talk"):
        convert.tokens_of_chat(chat(messages=[{"role": "user", "content": "refuse me"}]), TOKENIZER)
