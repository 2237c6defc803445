"""What an engine counts about itself."""

from jaxinfer.engine.metrics import EngineMetrics, StepRecord


def test_steps_are_counted_and_the_latest_kept():
    metrics = EngineMetrics()
    for number in range(5000):
        metrics.record(StepRecord("decode", 0.001, 0.0, number, 8))
    assert metrics.steps_total == 5000
    assert len(metrics.steps) == 4096
    assert metrics.steps[-1].tokens == 4999
    assert metrics.steps[0].tokens == 5000 - 4096


def test_reasons_start_at_zero_and_engines_share_nothing():
    one, other = EngineMetrics(), EngineMetrics()
    one.finished["stop"] += 1
    one.compile_seconds["decode1"] = 1.0
    one.record(StepRecord("mixed", 0.1, 0.0, 1, 1))
    assert other.finished["stop"] == other.steps_total == len(other.steps) == len(other.compile_seconds) == 0
