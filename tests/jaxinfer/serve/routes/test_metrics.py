"""GET /metrics."""

from prometheus_client.parser import text_string_to_metric_families


def test_both_families_of_names(client):
    client.post("/v1/completions", json={"prompt": "count me"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds", "prompt_tokens"):
        assert {f"jaxinfer_{name}", f"vllm:{name}"} <= names
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:request_success", "jaxinfer_compilations"} <= names
    assert "count me" not in answer.text
