"""The engine on a tiny random model: the same tokens whatever else happens, stop rules, penalties against NumPy, errors that stay alone."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.engine import engine as engine_module
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.grammar import Matcher
from jaxinfer.engine.scheduler import Limits
from jaxinfer.grammar import Grammar
from jaxinfer.request import FinishReason, QueueFull, Request, RequestError, SamplingParams, StopRules, choices
from jaxinfer.step.program import Program
from tests.counting import work
from tests.driving import Driver
from tests.jaxinfer.conftest import scheduler, settings

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def run(engine, *requests, during=None):
    """Add requests, step until all are done, checking the scheduler after every step. Returns for each key all its outputs."""
    outputs = {request.key: [] for request in requests}
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id, output.index].append(output)
        engine.scheduler.check()
        steps += 1
        if during is not None:
            during(steps)
    assert engine.scheduler.usage == 0.0
    assert engine.scheduler.running == engine.scheduler.waiting == 0
    return outputs


def tokens(outputs):
    return [token for output in outputs for token in output.token_ids]


def text(outputs):
    return "".join(output.text for output in outputs)


def one(engine, prompt=(1, 2, 3), params=GREEDY, **changes):
    """Run one request alone; its outputs."""
    request = Request("one", tuple(prompt), replace(params, **changes))
    return run(engine, request)["one", 0]


@pytest.fixture(scope="module")
def oracle(plain):
    """The same weights run plainly: float64 logits at every position of a sequence of at most 20 tokens."""
    driver = Driver(plain.program.config.graph, plain.program._leaves)
    return lambda sequence: driver.logits([sequence], [[len(sequence)]])[0].astype(np.float64)


# The same tokens, whatever else happens

VARIETY = [
    Request("greedy", tuple(range(40, 45)), GREEDY),
    Request("long", tuple(range(100, 137)), SamplingParams(seed=1, prompt_logprobs=2, max_tokens=20)),
    Request("seeded", (7,), SamplingParams(seed=-5, temperature=0.8, allowed_token_ids=range(60, 80), max_tokens=24)),
    Request("filtered", (9, 8, 7, 6), SamplingParams(seed=6, top_p=0.9, top_k=20, min_p=0.01, max_tokens=16)),
    Request(
        "penalised", (5, 5, 5), SamplingParams(seed=2, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, max_tokens=20)
    ),
    Request("penalised greedy", (60, 61), replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.2, max_tokens=20)),
    Request("biased", (3, 4), SamplingParams(seed=3, logit_bias={70: 5.0, 71: 4.5}, bad_words=["gh", "hg"], min_tokens=4, max_tokens=12)),
    Request("scored", tuple(range(11)), SamplingParams(seed=4, logprobs=3, max_tokens=10)),
    Request("repeated", (77,) * 17, replace(GREEDY, max_tokens=30)),
    Request(
        "in a grammar", (11, 12), SamplingParams(seed=8, temperature=1.5, grammar=Grammar.regex("([a-f]{2}-){3,5}[x-z]"), max_tokens=24)
    ),
    Request("cut in a grammar", tuple(range(20)), replace(GREEDY, grammar=Grammar.regex("[0-9]{20}"))),
]
KEYS = [request.key for request in VARIETY]


@pytest.fixture(scope="module")
def reference(plain):
    """Every request of the variety run alone."""
    return {request.key: run(plain, request)[request.key] for request in VARIETY}


def assert_same(found, reference, keys=KEYS):
    for key in keys:
        assert tokens(found[key]) == tokens(reference[key]), key
        assert text(found[key]) == text(reference[key]), key
        assert found[key][-1].finish_reason == reference[key][-1].finish_reason, key
        assert len(found[key][0].prompt_logprobs) == len(reference[key][0].prompt_logprobs)
        for left, right in zip(found[key][0].prompt_logprobs[1:], reference[key][0].prompt_logprobs[1:], strict=True):
            assert left.token == right.token
            np.testing.assert_allclose(left.logprob, right.logprob, atol=1e-4)
        for mine, other in zip(found[key], reference[key], strict=True):
            for left, right in zip(mine.logprobs, other.logprobs, strict=True):
                assert left.token == right.token
                np.testing.assert_allclose(left.logprob, right.logprob, atol=1e-4)


def test_again(plain, reference):
    assert_same({request.key: run(plain, request)[request.key] for request in VARIETY}, reference)


def test_in_a_full_batch(plain, reference):
    assert_same(run(plain, *VARIETY), reference)
    assert_same(run(plain, *reversed(VARIETY)), reference)


@pytest.mark.parametrize(
    ("chunk", "pages", "policy"), [(1, 65, "fcfs"), (7, 33, "shortest"), (32, 17, "priority"), (32, 40, "longest_prefix")]
)
def test_however_it_is_scheduled(reschedule, reference, chunk, pages, policy):
    plain = reschedule(Limits(sequences=4, prefill_tokens=chunk, prefill_rows=3), pages, policy)
    assert_same(run(plain, *(replace(request, priority=-i) for i, request in enumerate(VARIETY))), reference)


def test_in_chunks_and_preempted(cramped, reference):
    assert_same(run(cramped, *VARIETY), reference)
    assert cramped.metrics.preemptions == cramped.scheduler.preemptions > 0


@pytest.fixture
def events(monkeypatch):
    """What an engine does with the devices: "admit", "send" an array, launch so many tokens, "read" what was drawn."""
    found: list[object] = []

    def noted(owner, name, what):
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (found.append(what(*given)), usual(*given, **named))[1])

    noted(Program, "admit", lambda *_: "admit")
    noted(Program, "_send", lambda *_: "send")
    noted(Program, "forward", lambda _, packed, *rest: sum(len(row.tokens) for _, row in packed.rows))
    noted(engine_module, "fetch", lambda *_: "read")
    return found


def test_no_chunk_waits_for_the_one_before(reschedule, events):
    """Each step is launched before the one before it is read: between chunks, and from the last of them to the first decode."""
    engine = reschedule(Limits(4, 11, 2), 17)
    run(engine, Request("a", tuple(range(30)), replace(GREEDY, max_tokens=3)))
    assert [event for event in events if event not in ("send", "admit")] == [11, 11, "read", 8, "read", 1, "read", 1, "read", "read"]


def test_a_step_sends_one_array_and_each_new_sequence_one(plain, events):
    run(plain, *(Request(str(number), (5, 6, 7), replace(GREEDY, max_tokens=4)) for number in range(3)))
    assert events.count("admit") == 3 and events.count("send") == 3 + sum(isinstance(event, int) for event in events)


def test_the_work_of_handing_in_does_not_grow_with_the_prompt(plain, monkeypatch):
    monkeypatch.setattr(plain, "info", replace(plain.info, max_model_len=9000))
    long, short = (Request(name, (5,) * length, replace(GREEDY, top_k=1)) for name, length in (("long", 8000), ("short", 40)))
    assert abs(work(lambda: plain.add(long)) - work(lambda: plain.add(short))) < 50


def test_one_step_at_a_time(plain, reference, monkeypatch):
    monkeypatch.setattr(plain, "_depth", 0)
    assert_same(run(plain, *VARIETY), reference)


def test_whatever_happens_to_host_memory(plain, reference, monkeypatch):
    """Every buffer that went to the devices is spoiled as soon as it was sent."""
    send = plain.program._send

    def spoil(values, sharding):
        sent = send(values, sharding)
        values.fill(77)
        return sent

    monkeypatch.setattr(plain.program, "_send", spoil)
    assert_same(run(plain, *VARIETY), reference)


def test_choices_share_their_prompt(reschedule, reference):
    """The prompt is computed once; its half-filled last page is copied, and each choice goes its own way behind it."""
    plain = reschedule(Limits(sequences=4, prefill_tokens=32, prefill_rows=4), 65)
    prompt = tuple(range(100, 118))
    alone = [tokens(one(plain, prompt, SamplingParams(seed=seed, max_tokens=12))) for seed in (1, 2, 3)]
    plain = reschedule(plain.scheduler.limits, 65)
    found = run(plain, *(Request("many", prompt, SamplingParams(seed=seed, max_tokens=12), index) for index, seed in enumerate((1, 2, 3))))
    assert [tokens(found["many", index]) for index in range(3)] == alone
    assert plain.scheduler.reused == 2 * 17


def test_a_known_beginning_is_not_computed_again(reschedule, reference):
    plain = reschedule(Limits(sequences=4, prefill_tokens=32, prefill_rows=4), 65)
    long = Request("again", (*VARIETY[1].prompt, *tokens(reference["long", 0])[:7]), GREEDY)  # 44 tokens, generated ones among them
    fresh = run(plain, long)[long.key]
    plain = reschedule(plain.scheduler.limits, 65)
    assert_same(run(plain, VARIETY[1]), reference, [VARIETY[1].key])
    assert tokens(run(plain, long)[long.key]) == tokens(fresh)
    assert plain.scheduler.reused == 40  # full pages, never the last token
    assert tokens(run(plain, replace(long, cache_salt="mine"))[long.key]) == tokens(fresh)
    assert plain.scheduler.reused == 40


@pytest.mark.parametrize("kv_dtype", ["auto", pytest.param("int8", marks=pytest.mark.ci)])
def test_the_same_bits_in_deterministic_mode(folder, kv_dtype):
    """Log probabilities of every drawn token and its rivals, bit by bit, under all that may happen to a request."""
    wanted = settings(folder, deterministic="on")
    engine = Engine(replace(wanted, cache=replace(wanted.cache, kv_dtype=kv_dtype)))
    requests = [replace(request, params=replace(request.params, logprobs=20)) for request in VARIETY]
    limits, largest = engine.scheduler.limits, engine.program.config.pool.pages

    def bits(*, chunk=32, pages=largest, leave=None, again=1, together=requests):
        engine.scheduler = scheduler(replace(limits, prefill_tokens=chunk), pages)
        for _ in range(again):
            found = run(engine, *together, during=lambda step: engine.abort((leave or {}).get(step, "nobody")))
        return {key: [(output.token_ids, output.logprobs) for output in outputs] for key, outputs in found.items()}

    alone = {request.key: bits(together=[request])[request.key] for request in requests}
    assert bits() == alone
    assert bits(chunk=1) == bits(chunk=7) == alone
    assert bits(pages=17) == alone
    assert engine.scheduler.preemptions
    assert bits(again=2) == alone
    assert engine.scheduler.reused
    left = bits(leave={4: "seeded", 9: "biased"})
    assert {key: left[key] for key in alone if key[0] not in ("seeded", "biased")} == {
        key: value for key, value in alone.items() if key[0] not in ("seeded", "biased")
    }
    engine._depth = 0
    assert bits() == alone


def test_on_a_mesh(meshed, reference):
    assert_same(run(meshed, *VARIETY), reference)


@pytest.mark.parametrize("name", ["plain", "cramped"])
def test_while_neighbours_leave(name, reference, request):
    engine = request.getfixturevalue(name)
    doomed = [Request(f"doomed {i}", (i + 1,) * (i + 3), SamplingParams.of(max_tokens=30, ignore_eos=True)) for i in range(3)]
    leave = {2: "doomed 0", 5: "doomed 1", 9: "doomed 2", 11: "nobody"}
    mixed = [request for pair in zip(VARIETY, doomed, strict=False) for request in pair] + VARIETY[3:]
    found = run(engine, *mixed, during=lambda step: engine.abort(leave.get(step, "nobody")))
    assert_same(found, reference)
    assert {found[request.key][-1].finish_reason for request in doomed} == {FinishReason.ABORT}


def test_the_model_is_the_model(plain, reference, oracle):
    """Greedy tokens are the plain run's, and what is reported are its log probabilities."""
    sequence = [*VARIETY[0].prompt, *tokens(reference["greedy", 0])]
    exact = oracle(sequence)
    assert tokens(reference["greedy", 0]) == exact[4:-1].argmax(axis=-1).tolist()
    prompt, outputs = VARIETY[7].prompt, reference["scored", 0]
    exact = oracle([*prompt, *tokens(outputs)][:20])
    for position, output in enumerate(outputs[:9], len(prompt) - 1):
        scores = exact[position] - np.log(np.exp(exact[position]).sum())
        (scored,) = output.logprobs
        assert scored.token == output.token_ids[0]
        np.testing.assert_allclose(scored.logprob, scores[scored.token], atol=1e-4)
        best = np.argsort(-scores)[:3]
        assert [token for token, _ in scored.top] == best.tolist()
        np.testing.assert_allclose([score for _, score in scored.top], scores[best], atol=1e-4)


def test_penalties_are_those_of_the_twin(plain, oracle):
    params = replace(GREEDY, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.4, max_tokens=15, logit_bias={12: 0.9})
    prompt = [50, 51, 50]
    found = tokens(one(plain, prompt, params))
    exact = oracle([*prompt, *found])
    for step, token in enumerate(found):
        row = exact[len(prompt) - 1 + step]
        counts = np.bincount(found[:step], minlength=len(row))
        seen = (counts > 0) | np.isin(np.arange(len(row)), prompt)
        row = np.where(seen, np.where(row > 0, row / 1.4, row * 1.4), row) - 0.3 * counts - 0.4 * (counts > 0)
        row[12] += 0.9
        assert row[token] >= row.max() - 1e-4, step
    assert len(set(found)) > len(set(tokens(one(plain, prompt, max_tokens=15))))


def test_choices_differ_and_the_first_is_the_seeded_one(plain):
    request = Request("many", (4, 5), SamplingParams(seed=9, n=3, max_tokens=12))
    found = run(plain, *choices(request))
    texts = [tuple(tokens(found["many", index])) for index in range(3)]
    assert len(set(texts)) == 3
    assert texts[0] == tuple(tokens(one(plain, (4, 5), replace(request.params, n=1))))


def test_without_a_seed_no_two_runs_are_alike(plain):
    free = SamplingParams(max_tokens=12, temperature=2.0)
    assert tokens(one(plain, params=free)) != tokens(one(plain, params=free))


# Where a sequence ends


def letters(engine, **changes):
    """A greedy sequence over a, b and c."""
    ids = [engine.tokenizer.encode(letter, special=False)[0] for letter in "abc"]
    return one(engine, params=replace(GREEDY, logit_bias=dict.fromkeys(ids, 100.0), frequency_penalty=0.5, **changes))


def test_max_tokens(plain):
    outputs = one(plain)
    assert len(tokens(outputs)) == 8
    assert [output.finish_reason for output in outputs] == [None] * 7 + [FinishReason.LENGTH]
    assert [output.output_tokens for output in outputs] == list(range(1, 9))
    assert {output.prompt_tokens for output in outputs} == {3}
    assert len(tokens(one(plain, max_tokens=1))) == 1


def test_without_max_tokens_the_context_is_the_limit(plain):
    outputs = one(plain, prompt=range(60), max_tokens=None)
    assert len(tokens(outputs)) == 4
    assert outputs[-1].finish_reason == FinishReason.LENGTH


def test_text_is_that_of_the_tokens(plain):
    outputs = letters(plain)
    assert text(outputs) == plain.tokenizer.decode(tokens(outputs))
    assert set(text(outputs)) == set("abc")


def test_stop_tokens(plain):
    free = tokens(letters(plain))
    stop = free[4]
    outputs = letters(plain, stop=StopRules(token_ids=(stop,)))
    assert tokens(outputs) == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason == FinishReason.STOP
    assert outputs[-1].stop_reason == stop
    assert text(outputs) == plain.tokenizer.decode(tokens(outputs)[:-1])
    included = letters(plain, stop=StopRules(token_ids=(stop,), include_in_output=True))
    assert text(included) == plain.tokenizer.decode(tokens(outputs))


def test_stop_strings(plain):
    free = text(letters(plain))
    stop = free[3:5]
    at = free.index(stop)
    outputs = letters(plain, stop=StopRules(strings=(stop, "zz")))
    assert text(outputs) == free[:at]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)
    assert len(tokens(outputs)) == at + 2
    assert text(letters(plain, stop=StopRules(strings=(stop,), include_in_output=True))) == free[: at + 2]
    assert text(letters(plain, stop=StopRules(strings=("cccccccc",)))) == free


def test_end_of_sequence(plain):
    (eos,) = plain.tokenizer.eos_ids
    biased = replace(GREEDY, logit_bias={eos: 100.0})
    outputs = one(plain, params=biased)
    assert tokens(outputs) == [eos]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason, text(outputs)) == (FinishReason.STOP, None, "")
    ignored = one(plain, params=replace(biased, stop=StopRules(ignore_eos=True)))
    assert tokens(ignored) == [eos] * 8
    assert ignored[-1].finish_reason == FinishReason.LENGTH
    shown = one(plain, params=replace(biased, stop=StopRules(ignore_eos=True), skip_special_tokens=False, max_tokens=2))
    assert text(shown) == "<|eos|><|eos|>"


def test_min_tokens_hold_every_way_to_end(plain):
    (eos,) = plain.tokenizer.eos_ids
    held = tokens(one(plain, logit_bias={eos: 100.0}, min_tokens=3))
    assert len(held) == 4
    assert held.index(eos) == 3
    free = tokens(letters(plain))
    late = letters(plain, stop=StopRules(token_ids=(free[0],)), min_tokens=5)
    assert free[0] not in tokens(late)[:5]
    assert len(tokens(late)) > 5
    assert len(tokens(letters(plain, stop=StopRules(strings=("a", "b", "c")), min_tokens=5))) == 6


def test_ids_past_the_tokenizer_have_no_text(plain):
    outputs = one(plain, logit_bias={271: 100.0}, max_tokens=3)
    assert tokens(outputs) == [271] * 3
    assert text(outputs) == ""


# Rules about tokens, scores of prompts


def test_bad_words_stay_out(plain):
    free = text(letters(plain))
    for words in ([free[0]], [free[:2]], [free[1:4], free[:1]]):
        assert not any(word in text(letters(plain, bad_words=words)) for word in words)
    assert text(letters(plain, bad_words=["cccccccc"])) == free
    with pytest.raises(RequestError) as caught:
        one(plain, bad_words=["123456789"])
    assert caught.value.param == "bad_words"


def test_allowed_tokens_are_the_only_ones(plain):
    assert set(tokens(one(plain, temperature=2.0, allowed_token_ids=[70, 90], max_tokens=12))) == {70, 90}
    with pytest.raises(RequestError) as caught:
        one(plain, allowed_token_ids=[272])
    assert caught.value.param == "allowed_token_ids"


def test_rules_that_can_leave_nothing_are_refused(plain):
    (eos,) = plain.tokenizer.eos_ids
    for changes in ({"bad_words": ["a"], "allowed_token_ids": plain.tokenizer.encode("a")}, {"min_tokens": 1, "allowed_token_ids": [eos]}):
        with pytest.raises(RequestError) as caught:
            one(plain, **changes)
        assert caught.value.param == "allowed_token_ids"


def test_rules_that_leave_nothing_end_the_request_alone(plain):
    outputs = one(plain, allowed_token_ids=plain.tokenizer.encode("ab"), bad_words=["aa", "ab", "ba", "bb"])
    assert len(tokens(outputs)) == 1
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert "no token" in outputs[-1].error
    assert not plain.has_work


def test_a_prompts_scores_are_what_the_sampler_says(plain):
    """Greedy tokens with their logprobs, then the same tokens as a prompt: the same numbers."""
    drawn = one(plain, logprobs=3, max_tokens=20)
    made = [entry for output in drawn for entry in output.logprobs]
    prompt = (1, 2, 3, *(entry.token for entry in made))
    (outputs,) = run(plain, Request("again", prompt, replace(GREEDY, prompt_logprobs=3, max_tokens=2))).values()
    first, *rest = outputs[0].prompt_logprobs
    assert first is None
    assert len(rest) == len(prompt) - 1
    assert [entry.token for entry in rest] == list(prompt[1:])
    for mine, other in zip(rest[-len(made) :], made, strict=True):
        assert (mine.token, mine.rank, mine.top[0][0]) == (other.token, 1, other.token)
        assert mine.logprob == mine.top[0][1]
        np.testing.assert_allclose(mine.logprob, other.logprob, atol=1e-4)
    assert outputs[1].prompt_logprobs == ()


def test_every_choice_scores_the_prompt_itself(plain):
    """Neither a sibling's pages nor the cache's may stand in for it."""
    asked = Request("two", tuple(range(20)), replace(GREEDY, n=2, prompt_logprobs=0))
    for _ in range(2):
        first, second = (outputs[0].prompt_logprobs for outputs in run(plain, *choices(asked)).values())
        assert len(first) == len(second) == 20
        np.testing.assert_allclose([e.logprob for e in first[1:]], [e.logprob for e in second[1:]], atol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("prompt", "changes", "param"),
    [
        (range(64), {}, "prompt"),
        (range(60), {"max_tokens": 5}, "max_tokens"),
        ((272,), {}, "prompt"),
        ((1,), {"logit_bias": {272: 1.0}}, "logit_bias"),
        ((1,), {"stop": StopRules(token_ids=(272,))}, "stop_token_ids"),
        ((1,), {"n": 2}, "n"),
        ((1,), {"max_tokens": None, "min_tokens": 64}, "min_tokens"),
        ((1,), {"max_tokens": None, "min_tokens": 2**31 - 1}, "min_tokens"),
    ],
)
def test_what_can_never_run_is_refused_at_once(plain, prompt, changes, param):
    with pytest.raises(RequestError) as caught:
        plain.add(Request("bad", tuple(prompt), replace(GREEDY, **changes)))
    assert caught.value.param == param
    assert not plain.has_work


def test_the_longest_that_fits_runs(plain):
    assert len(tokens(one(plain, prompt=range(63), max_tokens=1))) == 1
    assert len(tokens(one(plain, prompt=(271,), logit_bias={271: 1.0}, max_tokens=63))) == 63


def test_one_id_runs_once_at_a_time(plain):
    plain.add(Request("twice", (1,), GREEDY))
    with pytest.raises(RequestError, match="running already"):
        plain.add(Request("twice", (2,), GREEDY))
    plain.abort("twice")
    assert [output.finish_reason for output in plain.run()] == [FinishReason.ABORT]


def test_a_full_line_says_so(cramped):
    for index in range(16):
        cramped.add(Request("waiting", (1, 2), GREEDY, index))
    with pytest.raises(QueueFull):
        cramped.add(Request("late", (1,), GREEDY))
    assert cramped.metrics.waiting == 16
    cramped.abort("waiting")
    assert cramped.metrics.waiting == 0
    assert len(list(cramped.run())) == 16


def test_aborting_gives_everything_back_at_once(plain):
    plain.add(Request("gone", tuple(range(20)), SamplingParams(max_tokens=30, stop=StopRules(ignore_eos=True))))
    for _ in range(3):
        plain.step()
    assert plain.metrics.running == 1
    assert plain.metrics.kv_usage > 0
    plain.abort("gone")
    assert plain.metrics.running == 0
    (last,) = plain.step()
    assert (last.finish_reason, last.output_tokens, last.token_ids) == (FinishReason.ABORT, 2, ())
    assert plain.metrics.kv_usage == 0.0
    assert plain.step() == []
    assert not plain.has_work


def test_bad_numbers_end_their_own_row_alone(plain, reference, monkeypatch):
    graph, program = plain.program.config.graph, plain.program
    weights = graph.weights(program._leaves)
    unused = set(range(272)).difference(*(tokens(outputs) for outputs in reference.values()), *(request.prompt for request in VARIETY))
    poison = max(unused)
    spoiled = weights | {"embedding.weight": weights["embedding.weight"].at[poison].set(jnp.nan)}
    bad = [Request("bad", (1, poison, 2), GREEDY), Request("worse", (poison,) * 30, replace(GREEDY, max_tokens=30))]
    with monkeypatch.context() as patch:
        patch.setattr(program, "_leaves", graph.leaves(spoiled))
        found = run(plain, bad[0], *VARIETY[:4], bad[1], *VARIETY[4:])
    for request in bad:
        (last,) = found[request.key]
        assert (last.finish_reason, last.token_ids) == (FinishReason.ERROR, ())
        assert "not finite" in last.error
    free = plain.scheduler.pools[0]._free
    for pool in program._kv:
        assert np.isfinite(np.asarray(pool)[free]).all(), "a free page holds what a failed request left"
    assert_same(found, reference)
    assert_same(run(plain, *VARIETY), reference)


@pytest.mark.ci
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_numbers_that_break_in_a_quantised_cache_stay_in_their_request(folder, monkeypatch, kv_dtype):
    """Codes hold no infinity and int8 no NaN: the scales carry it to the request's own logits, and free pages are clean afterwards."""
    wanted = settings(folder)
    engine = Engine(replace(wanted, cache=replace(wanted.cache, kv_dtype=kv_dtype)))
    assert engine.info.kv_dtype == {"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype]
    program, graph, others = engine.program, engine.program.config.graph, VARIETY[:4]
    alone = {request.key: run(engine, request)[request.key] for request in others}
    weights = graph.weights(program._leaves)
    poison = max(set(range(272)).difference(*(tokens(outputs) for outputs in alone.values()), *(request.prompt for request in others)))
    spoiled = weights | {"embedding.weight": weights["embedding.weight"].at[poison].set(jnp.nan)}
    bad = Request("bad", (1, poison, 2), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(program, "_leaves", graph.leaves(spoiled))
        found = run(engine, bad, *others)
    assert found[bad.key][-1].finish_reason == FinishReason.ERROR
    for pool in jax.tree.leaves(program._kv):
        assert np.isfinite(np.asarray(pool, np.float32)[engine.scheduler.pools[0]._free]).all()
    assert_same(found, alone, list(alone))


def test_text_that_cannot_be_made_ends_its_own_request(plain, reference, monkeypatch, caplog):
    original = type(plain.tokenizer).stream

    def stream(self, *, skip_special):
        made = original(self, skip_special=skip_special)
        if not skip_special:
            made.push = lambda token: 1 / 0
        return made

    monkeypatch.setattr(type(plain.tokenizer), "stream", stream)
    bad = Request("bad", (1, 2), replace(GREEDY, skip_special_tokens=False))
    found = run(plain, bad, *VARIETY)
    assert found[bad.key][-1].finish_reason == FinishReason.ERROR
    assert_same(found, reference)
    assert "bad failed" in caplog.text


# Grammars


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar.choice(["yes", "no"]), {"yes", "no"}),
        (Grammar.json_schema({"enum": [[1], {"a": "ü"}]}), {"[1]", '{"a":"ü"}'}),
        (Grammar.regex("a{4}"), {"aaaa"}),
    ],
)
def test_an_output_keeps_to_its_grammar_and_ends_with_it(plain, grammar, texts):
    for seed in range(4):
        outputs = one(plain, params=SamplingParams(seed=seed, temperature=2.0, grammar=grammar, logprobs=0))
        assert "".join(text(outputs).split()) in texts
        assert outputs[-1].finish_reason == FinishReason.STOP
        assert all(item.logprob < 0 for output in outputs for item in output.logprobs), "of the model, not of what the grammar leaves"


def test_the_variety_keeps_to_its_grammars(reference):
    assert re.fullmatch("([a-f]{2}-){3,5}[x-z]", text(reference["in a grammar", 0]))
    assert re.fullmatch("[0-9]{8}", text(reference["cut in a grammar", 0]))
    assert [reference[name, 0][-1].finish_reason for name in ("in a grammar", "cut in a grammar")] == ["stop", "length"]


def test_choices_share_a_grammar(plain):
    params = SamplingParams(n=3, seed=1, temperature=2.0, grammar=Grammar.regex("[a-z]{6}"))
    found = run(plain, *choices(Request("many", (1, 2, 3), params)))
    assert len({text(outputs) for outputs in found.values()}) == 3
    assert all(re.fullmatch("[a-z]{6}", text(outputs)) for outputs in found.values())


def test_an_end_of_sequence_token_may_come_where_the_text_may_end(plain):
    (eos,) = plain.tokenizer.eos_ids
    outputs = one(plain, grammar=Grammar.regex("[a-z]{2,9}"), logit_bias={eos: 100})
    assert (len(text(outputs)), tokens(outputs)[-1], outputs[-1].finish_reason) == (2, eos, FinishReason.STOP)


def test_a_grammar_that_fails_ends_its_own_request(plain, reference, monkeypatch):
    original, seen = Matcher.accept, []

    def accept(self, token):
        seen.append(self)
        original(self, token if self is not seen[0] or seen.count(self) < 3 else 200)

    bad = Request("bad", (1, 2), replace(GREEDY, grammar=Grammar.regex("[a-z]{20}"), max_tokens=20))
    monkeypatch.setattr(Matcher, "accept", accept)
    found = run(plain, bad, *VARIETY)
    assert (found[bad.key][-1].finish_reason, len(tokens(found[bad.key]))) == (FinishReason.ERROR, 2)
    assert "grammar" in found[bad.key][-1].error
    assert_same(found, reference)


def test_a_grammar_that_cannot_be_used_is_refused(plain):
    with pytest.raises(RequestError, match="unclosed group"):
        plain.add(Request("bad", (1,), replace(GREEDY, grammar=Grammar.regex("(a"))))
    assert not plain.has_work


# Around it


def test_nothing_compiles_once_the_engine_is_ready(plain, meshed):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: compiled.append(name))
    for engine in (plain, meshed):
        run(engine, *VARIETY)
    assert [name for name in compiled if "backend_compile" in name] == []
    jax.jit(lambda x: x * 3 + len(compiled))(np.float32(2))
    assert [name for name in compiled if name == "/jax/core/compile/backend_compile_duration"] != []


def test_counters(plain):
    before = replace(plain.metrics, finished=plain.metrics.finished.copy())
    found = run(plain, *VARIETY)
    after = plain.metrics
    assert after.prompt_tokens - before.prompt_tokens == sum(len(request.prompt) for request in VARIETY)
    assert after.generation_tokens - before.generation_tokens == sum(len(tokens(outputs)) for outputs in found.values())
    assert after.finished["length"] - before.finished["length"] == len(VARIETY) - 1
    assert after.finished["stop"] - before.finished["stop"] == 1
    assert (after.running, after.waiting, after.kv_usage) == (0, 0, 0.0)
    records = list(after.steps)[before.steps_total - after.steps_total :]
    assert {record.phase for record in records} == {"decode", "mixed"}
    assert all(0 < record.tokens <= record.padded_tokens for record in records)
    assert records[0].host_gap == 0.0


def test_what_is_not_counted_leaves_no_trace(plain):
    """Neither in the counters nor in the prefix cache, which it does not read either; preempted or not, ended or aborted."""
    prompt, pool = tuple(range(20)), plain.scheduler.pools[0]
    expected = one(plain, prompt)
    known, reused = len(pool.index), plain.scheduler.reused
    metrics = plain.metrics
    before = metrics.prompt_tokens, metrics.generation_tokens, metrics.finished.copy()
    for name, start in (("again", 0), ("other", 30), ("aborted", 60)):
        plain.add(Request(name, tuple(range(start, start + 20)), GREEDY), counted=False)
        assert (metrics.running, metrics.waiting) == (0, 0)
        outputs = plain.step() + plain.step()
        assert (metrics.running, metrics.waiting, plain.scheduler.running) == (0, 0, 1)
        plain.scheduler._preempt(plain.scheduler.find(name)[0])
        outputs += plain.step() + plain.step()
        if name == "aborted":
            plain.abort(name)
        outputs += plain.run()
        assert name != "again" or tokens(outputs) == tokens(expected)
    assert (metrics.prompt_tokens, metrics.generation_tokens, metrics.finished) == before
    assert (len(pool.index), plain.scheduler.reused) == (known, reused)


def test_an_idle_engine_does_nothing(plain):
    assert plain.step() == []
    assert list(plain.run()) == []


def test_shutting_down_forgets_everything(plain):
    for index in range(6):
        plain.add(Request("open", (1, 2), GREEDY, index))
    plain.step()
    plain.shutdown()
    assert not plain.has_work
    assert plain.scheduler.usage == 0.0
    assert plain.step() == []
