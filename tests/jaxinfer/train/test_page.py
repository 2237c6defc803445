"""The page holds what the figures say, and nothing of the user's as markup."""

from xml.etree import ElementTree

import pytest

from jaxinfer.train import page

BEFORE = {"temperature": 0.0, "agreement": 0.4, "stand": [0.4, 0.2, 0.1, 0.05], "places": 100, "tokens_per_step": 1.75}
AFTER = {**BEFORE, "stand": [0.6, 0.5, 0.4, 0.3], "tokens_per_step": 2.8}
FIGURES = {
    "target": "<demo>", "data": {"file": "a&b.jsonl", "texts": 9, "learned_tokens": 12345, "held_out": 2}, "device": "cpu",
    "loss": [3.0 / (1 + step) for step in range(1000)], "before": [BEFORE], "after": [AFTER],
}  # fmt: skip


def test_everything_is_said():
    text = page.render(FIGURES)
    assert "&lt;demo&gt;" in text and "<demo>" not in text and "a&amp;b.jsonl" in text and "12,345 tokens" in text
    assert "greedy: 1.75 tokens a step before, 2.80 after" in text and "<script" not in text and "http" not in text


def test_bars_are_as_high_as_their_shares():
    bars = ElementTree.fromstring(page.bars(BEFORE, AFTER)).findall("rect")
    heights = [float(bar.get("height")) for bar in bars]
    assert len(bars) == 8 and heights[1] / heights[0] == pytest.approx(1.5, rel=0.01)
    assert bars[7].find("title").text == "4 draft(s) in a row, after: 30.0% of 100 places"


@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_the_curve_has_few_points(steps):
    points = ElementTree.fromstring(page.loss(FIGURES["loss"][:steps])).find("polyline").get("points").split()
    assert 0 < len(points) <= page.POINTS
