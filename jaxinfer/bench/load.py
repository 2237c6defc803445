"""Open-loop load on a running server: requests arrive at random (Poisson) at a given rate, whether or not earlier ones are done.

Each request is a streamed /v1/completions call over its own connection, spoken here in plain asyncio so that the client costs little.
Reported: time to the first token, time between tokens and whole requests as percentiles, tokens per second, and what failed. This file
knows the server by its HTTP alone; nothing of jaxinfer's engine runs in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError
from jaxinfer.console import remark

HELP = "open-loop HTTP load on a running server: latency percentiles"
PERCENTILES = (50, 90, 99)
WORDS = ("once", "upon", "a", "time", "there", "was", "small", "boat", "that", "went", "far", "over", "the", "sea", "home", "story")


class Address(NamedTuple):
    """Where the server listens, and the key it wants (None: none)."""

    host: str
    port: int
    key: str | None


@dataclass
class Trace:
    """One request's times in seconds of one clock; `status` is the HTTP status, 0 if the connection failed."""

    sent: float
    status: int = 0
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server [http://127.0.0.1:8000]")
    parser.add_argument("--api-key", help="bearer token that the server wants")
    parser.add_argument("--rate", type=float, action="append", metavar="R", help="requests per second; may be repeated [4]")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="requests at each rate [64]")
    parser.add_argument("--prompt-words", type=int, default=64, metavar="N", help="words of a prompt, at most [64]")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of an answer [64]")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Put each rate on the server in turn; 1 if a request failed otherwise than by a polite refusal (429, 503)."""
    address, failures = _address(args), 0
    served = _server_info(args)
    with Report("load", args, device=str(served.get("device"))) as report:
        for rate in args.rate or [4.0]:
            remark(f"{args.requests} requests at {rate:g} a second")
            traces = asyncio.run(offer(address, rate, [_body(number, args) for number in range(args.requests)]))
            report.add(model=served.get("model"), rate=rate, **summary(traces))
            failures += sum(trace.status not in (200, 429, 503) for trace in traces)
    return int(failures > 0)


async def offer(address: Address, rate: float, bodies: Sequence[dict[str, Any]]) -> list[Trace]:
    """Send the bodies at random times, `rate` a second on average, and wait until all are answered."""
    draw, tasks = random.Random(0), []
    for body in bodies:
        tasks.append(asyncio.create_task(call(address, body)))
        await asyncio.sleep(draw.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def call(address: Address, body: dict[str, Any]) -> Trace:
    """One streamed request, timed."""
    trace = Trace(sent=time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:
        trace.ended = time.perf_counter()
        return trace
    try:
        writer.write(_http(address, body))
        trace.status = int((await reader.readline()).split()[1])
        async for event in _events(reader):
            if trace.status == 200 and event != "[DONE]" and json.loads(event).get("choices"):
                trace.tokens.append(time.perf_counter())
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError):
        trace.status = 0
    finally:
        writer.close()
        trace.ended = time.perf_counter()
    return trace


def summary(traces: Sequence[Trace]) -> dict[str, Any]:
    """Percentiles in milliseconds over the requests that were answered, counts of the others."""
    answered = [trace for trace in traces if trace.status == 200 and trace.tokens]
    seconds = max(trace.ended for trace in traces) - min(trace.sent for trace in traces)
    row: dict[str, Any] = {"requests": len(traces), "answered": len(answered)}
    row["events_per_second"] = sum(len(trace.tokens) for trace in answered) / max(seconds, 1e-9)
    row |= _percentiles("first_token", [trace.first for trace in answered])
    row |= _percentiles("between_tokens", [gap for trace in answered for gap in trace.gaps])
    row |= _percentiles("request", [trace.ended - trace.sent for trace in answered])
    statuses = Counter(trace.status for trace in traces if trace not in answered)
    return row | {"refused": {str(status): count for status, count in sorted(statuses.items())} or None}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    places = {p: ordered[min(len(ordered) - 1, len(ordered) * p // 100)] if ordered else None for p in PERCENTILES}
    return {f"{name}_ms_p{p}": None if value is None else value * 1e3 for p, value in places.items()}


def _body(number: int, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(number)
    prompt = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, args.prompt_words)))
    return {"prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def _address(args: argparse.Namespace) -> Address:
    parts = urlsplit(args.url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ConfigError(f"--url {args.url}: write for example http://127.0.0.1:8000")
    return Address(parts.hostname, parts.port or 80, args.api_key)


def _server_info(args: argparse.Namespace) -> dict[str, Any]:
    """What the server says about itself; this process must not touch the device that the server uses."""
    address, headers = _address(args), {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    connection = HTTPConnection(address.host, address.port, timeout=10)
    try:
        connection.request("GET", "/server_info", headers=headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        return json.loads(answer.read())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--url {args.url}: no jaxinfer server answers there ({error}); start one with `jaxinfer serve`") from None
    finally:
        connection.close()


def _http(address: Address, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1", f"host: {address.host}:{address.port}", "content-type: application/json",
        f"content-length: {len(content)}", "connection: close", *([f"authorization: Bearer {address.key}"] if address.key else []),
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + content


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events in a response body, chunked or not."""
    chunked = False
    while (line := await reader.readline()).strip():
        chunked |= line.lower().replace(b" ", b"").startswith(b"transfer-encoding:chunked")
    pending = b""
    async for piece in _chunks(reader) if chunked else _pieces(reader):
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece
