"""A plan is plain data."""

import json

from jaxinfer.planner.outcome import Plan, Wanted


def test_a_plan_survives_json():
    plan = Plan("m", {"slice": "cpu-1"}, {}, fits=False, failure="it died")
    assert Plan(**json.loads(json.dumps(plan.fields()))) == plan
    assert plan.fields()["fits"] is False and not plan.refused


def test_what_may_be_left_open():
    assert Wanted() == (None, None, None, "throughput", None, None, True, False, None, None)
