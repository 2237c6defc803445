"""The load generator against a live server with an echoing engine, and against servers that misbehave."""

import asyncio
import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import load
from jaxinfer.bench.load import Address, Trace
from tests.fakes import LiveServer, until


def run(capsys, *arguments):
    code = program.main(["bench", "load", "--json", *arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_against_a_live_server(capsys):
    with LiveServer(api_key="sesame") as server:
        with server.client() as client:
            until(lambda: client.get("/health").status_code == 200)
        flags = ["--url", server.url, "--requests", "4", "--rate", "400", "--max-tokens", "3"]
        code, rows, _ = run(capsys, *flags, "--api-key", "sesame")
        assert code == 0 and len(rows) == 1
        assert (rows[0]["requests"], rows[0]["answered"], rows[0]["model"], rows[0]["refused"]) == (4, 4, "fake", None)
        assert 0 < rows[0]["first_token_ms_p50"] <= rows[0]["request_ms_p99"] and "sesame" not in json.dumps(rows)
        traces = asyncio.run(load.offer(Address("127.0.0.1", server.server.port, "wrong"), 1000.0, [{"prompt": "x"}] * 2))
        assert load.summary(traces)["refused"] == {"401": 2}


@pytest.mark.parametrize(
    ("answer", "status", "tokens"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [1]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n', 200, 1),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n10\r\n {"choices":[1]}\r\n1\r\n\n\r\n0\r\n\r\n', 200, 1),
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", 503, 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n55\r\ndata", 0, 0),
        (b"", 0, 0),
    ],
)
def test_what_servers_may_say(answer, status, tokens):
    async def scene():
        async def handle(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            return await load.call(Address("127.0.0.1", server.sockets[0].getsockname()[1], None), {"prompt": "x"})

    trace = asyncio.run(scene())
    assert (trace.status, len(trace.tokens)) == (status, tokens)


def test_percentiles():
    traces = [Trace(0.0, 200, [0.01 * i, 0.01 * i + 0.001], 0.01 * i + 0.002) for i in range(1, 101)]
    row = load.summary([*traces, Trace(0.0, 429, [], 0.1)])
    assert (row["answered"], row["refused"]) == (100, {"429": 1})
    assert row["first_token_ms_p50"] == pytest.approx(510) and row["between_tokens_ms_p99"] == pytest.approx(1)
    assert load.summary([Trace(0.0, 0, [], 1.0)])["request_ms_p50"] is None


def test_no_server(capsys, unused_port=1):
    code, _, err = run(capsys, "--url", f"http://127.0.0.1:{unused_port}")
    assert code == 2 and "no jaxinfer server answers there" in err and "start one with `jaxinfer serve`" in err
    assert run(capsys, "--url", "ftp://x")[0] == 2
    assert asyncio.run(load.call(Address("127.0.0.1", unused_port, None), {})).status == 0
