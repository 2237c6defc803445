"""What /metrics shows: `jaxinfer_*` names of our own and, for what vLLM has too, its usual `vllm:*` names beside them.

Totals and gauges are read from the engine's own counters when somebody asks; times of requests are measured here, on the event loop,
from when a call was validated to when its outputs came back. Every server has a registry of its own. No label ever holds a prompt, a
key or anything else that a client sends. This file does not know how the engine counts or how answers are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from jaxinfer.request import Output
from jaxinfer.serve.convert import Call

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_STEP = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class _Reading:
    """A number that the engine keeps itself: our name, vLLM's (or ""), what it means, how to read it from the engine's metrics.

    `labels` names the label of a reading that returns a mapping.
    """

    own: str
    vllm: str
    help: str
    read: Callable[[Any], Any]
    family: Any = CounterMetricFamily
    label: str = ""


def _drafts(name: str, help: str, read: Callable[[Any], Any], label: str = "") -> _Reading:
    return _Reading(f"spec_decode_num_{name}", f"spec_decode_num_{name}", help, read, label=label)


_READINGS = (
    _Reading("requests_running", "num_requests_running", "Sequences that the engine works on.", lambda m: m.running, GaugeMetricFamily),
    _Reading("requests_waiting", "num_requests_waiting", "Sequences that wait for a place.", lambda m: m.waiting, GaugeMetricFamily),
    _Reading("kv_cache_usage", "kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", lambda m: m.kv_usage, GaugeMetricFamily),
    _Reading("prompt_tokens", "prompt_tokens", "Prompt tokens taken.", lambda m: m.prompt_tokens),
    _Reading("generation_tokens", "generation_tokens", "Tokens generated.", lambda m: m.generation_tokens),
    _Reading("preemptions", "num_preemptions", "Sequences that gave up their pages and were computed again.", lambda m: m.preemptions),
    _Reading("requests_finished", "request_success", "Sequences ended, by reason.", lambda m: dict(m.finished), label="finished_reason"),
    _drafts("drafts", "Rows of steps that had drafts.", lambda m: m.drafts),
    _drafts("draft_tokens", "Drafts that were verified.", lambda m: m.draft_tokens),
    _drafts("accepted_tokens", "Drafts that stood.", lambda m: m.accepted_tokens),
    _drafts("accepted_tokens_per_pos", "Drafts that stood, by place.", lambda m: dict(m.accepted_at), label="position"),
    _Reading("shadow_checks", "", "Requests run again without drafts.", lambda m: m.shadow["checks"]),
    _Reading("shadow_mismatches", "", "Requests that gave other tokens without drafts.", lambda m: m.shadow["mismatches"]),
    _Reading("steps", "", "Steps of the engine.", lambda m: m.steps_total),
    _Reading("compilations", "", "Programs compiled, by bucket.", lambda m: dict.fromkeys(m.compile_seconds, 1), label="bucket"),
    _Reading("compile_seconds", "", "Seconds spent on compiling, by bucket.", lambda m: dict(m.compile_seconds), label="bucket"),
)


class Metrics:
    """One server's registry. `engine` returns the loaded engine, or None; `name` is the served model's, None for the engine's own."""

    def __init__(self, engine: Callable[[], Any], name: str | None = None) -> None:
        self._registry = CollectorRegistry()
        self._engine = engine
        self._name = name
        self._arrived: dict[str, float] = {}
        self._latest: dict[tuple[str, int], float] = {}
        self._steps_seen = 0
        self._padding = (0, 0)
        self.first_token = self._histogram("time_to_first_token_seconds", "From the validated request to its first token.", _LATENCY)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _GAP)
        self.whole = self._histogram("e2e_request_latency_seconds", "From the validated request to its last token.", _LATENCY)
        self.prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self.generated = self._histogram("request_generation_tokens", "Tokens generated for a sequence.", _TOKENS)
        self.iteration = self._histogram("iteration_tokens_total", "Tokens computed in one step, padding not counted.", _ITERATION)
        own = {"registry": self._registry, "namespace": "jaxinfer"}
        self.step = Histogram("step_seconds", "Duration of a step, by phase.", ["phase"], buckets=_STEP, **own)
        self.host_gap = Histogram("host_gap_seconds", "Between the end of a step and the beginning of the next.", buckets=_STEP, **own)
        self._registry.register(_EngineReadings(self))

    def _histogram(self, name: str, help: str, buckets: Sequence[int | float]) -> Histogram:
        """A histogram under our name and, as a view of the same numbers, under vLLM's."""
        histogram = Histogram(name, help, namespace="jaxinfer", buckets=buckets, registry=self._registry)
        self._registry.register(_VllmView(histogram, name, self))
        return histogram

    @property
    def labels(self) -> dict[str, str]:
        """What vLLM's names carry."""
        engine = self._engine()
        return {"model_name": self._name or (engine.info.model if engine is not None else ""), "engine": "0"}

    def arrived(self, call: Call, now: float) -> None:
        """A call was validated and goes to the engine (`now` in monotonic seconds)."""
        for request in call.sequences:
            self._arrived[request.id] = now

    def left(self, call: Call) -> None:
        """A call has ended, whatever the way."""
        for request in call.sequences:
            self._arrived.pop(request.id, None)
            self._latest.pop(request.key, None)

    def observe(self, outputs: Sequence[Output], now: float) -> None:
        """Note what a step produced."""
        for output in outputs:
            begun = self._arrived.get(output.request_id)
            if begun is None:
                continue
            key = (output.request_id, output.index)
            if output.token_ids:
                self._observe_tokens(key, len(output.token_ids), begun, now)
            if output.finish_reason is not None:
                self._latest.pop(key, None)
                self.whole.observe(now - begun)
                self.prompt.observe(output.prompt_tokens)
                self.generated.observe(output.output_tokens)

    def _observe_tokens(self, key: tuple[str, int], count: int, begun: float, now: float) -> None:
        before = self._latest.get(key)
        if before is None:
            self.first_token.observe(now - begun)
        else:
            for _ in range(count):
                self.between_tokens.observe((now - before) / count)
        self._latest[key] = now

    def take_steps(self) -> None:
        """Fold in the steps that the engine made since the last time (it keeps the latest few thousand); call it every few seconds."""
        engine = self._engine()
        if engine is None:
            return
        counters = engine.metrics
        total, records = counters.steps_total, list(counters.steps)
        fresh = records[max(0, len(records) - (total - self._steps_seen)) :] if total > self._steps_seen else []
        self._steps_seen = total
        tokens, padded = self._padding
        for record in fresh:
            self.step.labels(record.phase).observe(record.seconds)
            self.host_gap.observe(record.host_gap)
            self.iteration.observe(record.tokens)
            tokens, padded = tokens + record.tokens, padded + record.padded_tokens
        self._padding = (tokens, padded)

    def readings(self) -> Iterator[Metric]:
        """The engine's own numbers as they are now."""
        engine = self._engine()
        if engine is None:
            return
        for reading in _READINGS:
            value = reading.read(engine.metrics)
            yield _family("jaxinfer_" + reading.own, reading, value, {})
            if reading.vllm:
                yield _family("vllm:" + reading.vllm, reading, value, self.labels)
        tokens, padded = self._padding
        ratio = 1.0 - tokens / padded if padded else 0.0
        yield GaugeMetricFamily("jaxinfer_padding_ratio", "Share of the computed tokens that were padding, since the start.", ratio)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        self.take_steps()
        return generate_latest(self._registry)


def _family(name: str, reading: _Reading, value: Any, labels: dict[str, str]) -> Metric:
    names = [*labels, reading.label] if reading.label else list(labels)
    family = reading.family(name, reading.help, labels=names)
    for label, number in value.items() if reading.label else ((None, value),):
        family.add_metric([*labels.values(), *([] if label is None else [str(label)])], number)
    return family


class _EngineReadings(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """What the registry calls when it is asked."""
        return self._metrics.readings()


class _VllmView(Collector):
    """A histogram's numbers under vLLM's name and labels."""

    def __init__(self, histogram: Histogram, name: str, metrics: Metrics) -> None:
        self._histogram = histogram
        self._name = name
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """What the registry calls when it is asked."""
        for family in self._histogram.collect():
            view = Metric("vllm:" + self._name, family.documentation, "histogram")
            for sample in family.samples:
                suffix = sample.name.removeprefix(family.name)
                if suffix != "_created":
                    view.samples.append(Sample(view.name + suffix, {**self._metrics.labels, **sample.labels}, sample.value))
            yield view
