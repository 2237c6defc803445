"""What the server says on stderr when it starts and when it is ready: where it is, what runs, what to paste. It never prints the key."""

from __future__ import annotations

import sys
from typing import Any

from jaxinfer.config import ServerConfig
from jaxinfer.serve.context import Context
from jaxinfer.serve.convert import effective_defaults

EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
ALWAYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DEMO = "demo"
DEMO_NOTE = "this is the small demo model that comes with jaxinfer; --model takes a folder or a Hugging Face name"


def url(config: ServerConfig, port: int) -> str:
    """Where a person on this machine finds the server."""
    host = "127.0.0.1" if config.host in EVERYWHERE else config.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def starting(model: str, config: ServerConfig, port: int) -> None:
    """Before anything is loaded."""
    say(f"jaxinfer: loading {model!r}; {url(config, port)}/health tells how far it is")


def ready(context: Context, port: int, seconds: float) -> None:
    """Once requests are answered."""
    say("\n".join(lines(context, port, seconds)))


def lines(context: Context, port: int, seconds: float) -> list[str]:
    """The banner, line by line."""
    config, engine = context.config, context.engine.engine
    info, base = engine.info, url(config, port)
    defaults = {name: value for name, value in effective_defaults(engine.defaults).items() if name in ALWAYS or name in engine.defaults}
    mesh = f" x {info.device_count} ({info.mesh})" if info.device_count > 1 else ""
    tokens = f"{info.kv_tokens:,} tokens in {info.kv_dtype}"
    facts = {
        "url": f"{base}   (a chat page; the API is under {base}/v1)",
        "model": f"{context.model}: {info.architecture}, {info.parameters / 1e6:,.1f} M parameters",
        "device": f"{info.device}{mesh}, {info.dtype}",
        "KV cache": f"{tokens}; up to {info.max_concurrency} requests of {info.max_model_len:,} tokens at once",
        "memory": f"{_gib(info.weight_bytes)} weights, {_gib(info.program_bytes)} programs, {_gib(info.kv_bytes)} KV cache",
        "sampling": ", ".join(f"{name} {_plain(value)}" for name, value in defaults.items()),
        "key": "clients must send it as a bearer token" if config.api_key else "",
        "open to": "every machine that reaches this one; consider --api-key" if config.host in EVERYWHERE and not config.api_key else "",
        "note": DEMO_NOTE if info.model == DEMO else "",
    }
    shown = [f"  {name:9} {value}" for name, value in facts.items() if value]
    return [f"jaxinfer: ready after {seconds:.1f} s", *shown, "  try it:", "    " + curl(context, base), "  Ctrl-C ends the server."]


def curl(context: Context, base: str) -> str:
    """A line to paste."""
    chat = context.engine.engine.tokenizer.chat_template is not None
    body = '{"messages": [{"role": "user", "content": "Who are you?"}]}' if chat else '{"prompt": "Once upon a time", "max_tokens": 60}'
    key = " -H 'Authorization: Bearer KEY'" if context.config.api_key else ""
    route = "chat/completions" if chat else "completions"
    return f"curl {base}/v1/{route} -H 'Content-Type: application/json'{key} -d '{body}'"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Print a line for the person who started the server; stdout stays empty."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - for the person who started the server
