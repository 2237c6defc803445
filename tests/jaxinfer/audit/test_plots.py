"""Pictures are well-formed SVG, and marks stand where their values lie."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from jaxinfer.audit import plots
from jaxinfer.audit.plots import Point
from jaxinfer.audit.statistics import Estimate


def parsed(picture):
    return ElementTree.fromstring(picture)


def test_every_token_is_in_a_bar(judged):
    scheme = judged[0]
    picture = plots.histograms([scheme, replace(scheme, name="<&>")], 0.02)
    counts = [int(text.replace(",", "")) for text in re.findall(r"int8: ([\d,]+) tokens", picture)]
    assert sum(counts) == scheme.divergence.tokens
    assert "&lt;&amp;&gt;" in picture and len(parsed(picture).findall("rect")) == 2 * len(counts)


def test_the_few_below_the_axis_are_in_its_first_bar():
    counts = [1] * 2 + [0] * 18 + [300] + [0] * 19
    assert plots._shown([counts]) == [pytest.approx(1e-3), pytest.approx(10**-2.75)]
    gathered = plots._gathered(counts, 1e-3)
    assert gathered[20] == 302 and sum(gathered) == 302 and len(gathered) == len(counts)


def test_a_line_has_a_dot_for_each_place(judged):
    picture = parsed(plots.along([judged[0]], 0.02))
    assert len(picture.findall("circle")) == len(judged[0].divergence.places) and len(picture.findall("polyline")) == 1
    assert plots.along([replace(judged[0], divergence=replace(judged[0].divergence, places=()))], 0.02) == ""


def test_scatters_keep_names_apart_and_inside():
    figures = {"int8": (0.5, 1e-3), "w8a8": (0.5, 1.05e-3), "a long name": (1.0, 1e-2), "broken": (1.0, float("nan"))}
    points = [Point(name, x, y, name) for name, (x, y) in figures.items()]
    picture = parsed(plots.scatter(points, 0.0, label="memory", one="unquantised"))
    names = {item.text: (float(item.get("x")), float(item.get("y"))) for item in picture.findall("text") if item.get("class") == "name"}
    assert set(names) == {"int8", "w8a8", "a long name"} and abs(names["int8"][1] - names["w8a8"][1]) >= 14
    assert all(x > 0 and x + 7 * len(name) < 380 for name, (x, _) in names.items())
    assert len(picture.findall("circle")) == 3


def test_pictures_of_figures_that_are_not_finite_are_pictures(judged):
    found = replace(judged[0].divergence, mean=Estimate(float("nan")), p99=float("nan"), histogram=(0,) * 40)
    parsed(plots.histograms([replace(judged[0], divergence=found)], 0.0))
