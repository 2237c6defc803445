"""Axes say what stands where, and marks are well-formed."""

from xml.etree import ElementTree

import pytest

from jaxinfer import pictures
from jaxinfer.pictures import Scale


def test_scales():
    linear, log = Scale(0, 10, 100, 200), Scale(1e-4, 1, 0, 400, log=True)
    assert (linear(5), linear(-3), linear(30)) == (150, 100, 200)
    assert (log(1e-2), log(0), log(7)) == (200, 0, 400)
    assert [text for _, text in log.ticks()] == ["10⁻⁴", "0.001", "0.01", "0.1", "1"]
    assert [text for _, text in linear.ticks()] == ["0", "2", "4", "6", "8", "10"]
    assert [text for _, text in Scale(90, 410, 0, 1).ticks()] == ["100", "200", "300", "400"]
    assert pictures.decades([0.02]) == pytest.approx((0.01, 0.1)) and pictures.decades([1e-5, 1]) == pytest.approx((1e-5, 1))


def test_a_picture_is_well_formed():
    x, y = Scale(0, 10, 0, 100), Scale(0, 1, 50, 0)
    marks = [pictures.bar(1, 2, 3, 4, "s0", "<a>"), pictures.dot(1, 2, pictures.colour(9), "b", radius=3)]
    tree = ElementTree.fromstring(pictures.svg(100, 60, [*pictures.grid(x, 0, 50, "&"), *pictures.levels(y, x), *marks], "two"))
    assert tree.find("rect/title").text == "<a>" and tree.find("circle").get("class") == "dot s1" and pictures.STYLE.is_file()
