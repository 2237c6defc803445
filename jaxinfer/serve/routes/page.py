"""GET /: the chat page, one static file that loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()

PAGE = files("jaxinfer.serve").joinpath("page.html").read_bytes()


def _hash_of(tag: bytes) -> str:
    """The hash that lets exactly this page's own inline code run, and none that finds its way in."""
    code = PAGE.split(b"<" + tag + b">", 1)[1].split(b"</" + tag + b">", 1)[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(code).digest()).decode() + "'"


HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src {_hash_of(b'script')}; style-src {_hash_of(b'style')}; img-src data:;"
    " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat page. It holds no secret: with an API key in force it asks its user for it."""
    return Response(PAGE, headers=HEADERS, media_type="text/html")
