"""Figures of requests and steps, under our names and vLLM's."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxinfer.engine.metrics import StepRecord
from jaxinfer.request import FinishReason, Output, Request
from jaxinfer.serve.convert import Call
from jaxinfer.serve.metrics import Metrics
from tests.fakes import FakeEngine

REQUEST = Request("r", (1, 2, 3))
CALL = Call("id", "m", 0, ((1, 2, 3),), (REQUEST,))


@pytest.fixture
def engine():
    return FakeEngine()


def values(metrics, engine_label=None):
    """Every sample as {name{labels}: value}; vLLM's names are found by their name alone."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + "".join(f"|{v}" for v in labels.values())] = sample.value
    return found


def test_times_of_a_request(engine):
    metrics = Metrics(lambda: engine)
    metrics.arrived(CALL, 100.0)
    one = Output("r", token_ids=(5,), prompt_tokens=3, output_tokens=1)
    metrics.observe([one], 100.3)
    metrics.observe([replace(one, token_ids=(6, 7), output_tokens=3)], 100.5)
    metrics.observe([replace(one, token_ids=(8,), output_tokens=4, finish_reason=FinishReason.STOP)], 100.6)
    metrics.left(CALL)
    found = values(metrics)
    for family in ("jaxinfer_", "vllm:"):
        assert found[family + "time_to_first_token_seconds_sum"] == pytest.approx(0.3)
        assert found[family + "inter_token_latency_seconds_count"] == 3
        assert found[family + "inter_token_latency_seconds_sum"] == pytest.approx(0.3)
        assert found[family + "e2e_request_latency_seconds_sum"] == pytest.approx(0.6)
        assert found[family + "request_prompt_tokens_sum"] == 3
        assert found[family + "request_generation_tokens_sum"] == 4
        assert found[family + "time_to_first_token_seconds_bucket|0.5"] == 1


def test_what_nobody_waits_for_is_not_measured(engine):
    metrics = Metrics(lambda: engine)
    metrics.arrived(CALL, 1.0)
    metrics.left(CALL)
    metrics.observe([Output("r", token_ids=(1,))], 2.0)
    assert values(metrics)["jaxinfer_time_to_first_token_seconds_count"] == 0
    assert not metrics._arrived
    assert not metrics._latest


def test_the_engines_own_counters(engine):
    counters = engine.metrics
    counters.running, counters.waiting, counters.kv_usage, counters.preemptions = 3, 2, 0.25, 7
    counters.prompt_tokens, counters.generation_tokens = 11, 13
    counters.finished["stop"] = 4
    counters.shadow.update({"checks": 9, "mismatches": 1})
    counters.drafts, counters.draft_tokens, counters.accepted_tokens = 5, 20, 8
    counters.accepted_at.update({0: 5, 1: 3})
    metrics = Metrics(lambda: engine, "served")
    found = values(metrics)
    assert found["vllm:num_requests_running"] == found["jaxinfer_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:prompt_tokens_total"] == found["jaxinfer_prompt_tokens_total"] == 11
    assert found["vllm:generation_tokens_total"] == 13
    assert found["vllm:num_preemptions_total"] == 7
    assert found["vllm:request_success_total|stop"] == 4
    assert found["vllm:spec_decode_num_drafts_total"] == found["jaxinfer_spec_decode_num_drafts_total"] == 5
    assert (found["jaxinfer_shadow_checks_total"], found["jaxinfer_shadow_mismatches_total"]) == (9, 1)
    assert (found["vllm:spec_decode_num_draft_tokens_total"], found["vllm:spec_decode_num_accepted_tokens_total"]) == (20, 8)
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total|1"] == 3
    assert found["jaxinfer_compilations_total|t16"] == 1
    assert found["jaxinfer_compile_seconds_total|t16"] == 0.5
    assert 'vllm:num_requests_running{engine="0",model_name="served"} 3.0' in metrics.text().decode()


def test_steps_are_folded_in_once_even_when_old_ones_were_dropped(engine):
    metrics = Metrics(lambda: engine)
    for i in range(5000):
        engine.metrics.record(StepRecord("decode" if i % 2 else "mixed", 0.001, 0.0001, 12, 16))
        if i == 3000:
            metrics.take_steps()
            metrics.take_steps()
    found = values(metrics)
    assert found["jaxinfer_step_seconds_count|decode"] == found["jaxinfer_step_seconds_count|mixed"] == 2500
    assert found["jaxinfer_host_gap_seconds_count"] == 5000
    assert found["vllm:iteration_tokens_total_sum"] == 60_000
    assert found["jaxinfer_padding_ratio"] == pytest.approx(0.25)
    assert found["jaxinfer_steps_total"] == 5000


def test_without_an_engine_there_is_little_to_say():
    found = values(Metrics(lambda: None))
    assert "jaxinfer_requests_running" not in found
    assert found["vllm:time_to_first_token_seconds_count"] == 0
