"""GET /: the chat page holds everything itself and lets nothing else in."""

import re

from jaxinfer.serve.routes.page import PAGE


def test_the_page(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert len(answer.content) < 50_000
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2


def test_it_loads_nothing_from_elsewhere():
    text = PAGE.decode()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "innerHTML" not in text
    assert " on" + "click=" not in text
    assert 'style="' not in text


def test_every_input_has_a_label():
    text = PAGE.decode()
    for name in re.findall(r'<(?:input|textarea)[^>]*id="(\w+)"', text):
        assert f'for="{name}"' in text or re.search(rf'<label[^>]*><input[^>]*id="{name}"', text), name
    for button in re.findall(r"<button[^>]*>", text):
        assert "aria-label" in button or 'id="reset"' in button
    assert '<html lang="en">' in text
    assert "prefers-reduced-motion" in text
