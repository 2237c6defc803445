"""The page: self-contained, escaped, and nothing left out."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from jaxinfer.audit import page, session
from jaxinfer.audit.report import Data, Likely, Report

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "circle", "line", "rect"}


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def report(basis, judged):
    worst = replace(judged[0].worst[0], context=f"{HOSTILE}\nbefore", token="\n", reference=(Likely(HOSTILE, 0.5), Likely(" a\n", 0.25)))
    schemes = (replace(judged[0], worst=(worst,)), replace(judged[0], name=HOSTILE, within=False, speed=None))
    data = Data(HOSTILE, "ab" * 32, 3, 2, judged[0].divergence.tokens, 0, 40)
    stamp = {"device": "cpu", "command": HOSTILE}
    return Report(HOSTILE, "float32", 0.02, data, session.reference(basis, judged[1], 64), schemes, {}, stamp)


def test_the_page_stands_alone_and_is_escaped(report):
    text = page.render(report)
    balance = Balance()
    balance.feed(text)
    assert balance.open == [] and not {"script", "link", "img", "iframe"} & set(balance.seen)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r'(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org)', text)
    assert "prefers-color-scheme: dark" in text


def test_everything_is_on_it(report):
    text = page.render(report)
    for said in ("over budget", "within budget", "mean KL, nats per token", "All figures", "SHA-256 abab", "⏎", "␣a", "95 % bootstrap"):
        assert said in text
    assert text.count("<svg") == 3  # the speed of one scheme was not measured, so there is no picture of speeds
    both = page.render(replace(report, schemes=report.schemes[:1]))
    assert both.count("<svg") == 4


def test_broken_numbers_are_said(report):
    scheme = replace(report.schemes[0], within=False, divergence=replace(report.schemes[0].divergence, not_finite=5))
    assert "5 tokens are not finite" in page.render(replace(report, schemes=(scheme,)))
