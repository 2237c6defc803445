"""`jaxinfer serve`: an OpenAI-compatible server with a chat page. `python -m jaxinfer.serve` is the same command."""

from __future__ import annotations

import argparse

from jaxinfer import config
from jaxinfer.config import EngineConfig, ServerConfig

HELP = "serve a model over HTTP with an OpenAI-compatible API and a chat page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command: every setting of the engine and of the server."""
    config.add_arguments(parser, ServerConfig)
    config.add_arguments(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; returns the exit code."""
    engine, server = config.from_arguments(EngineConfig, vars(args)), config.from_arguments(ServerConfig, vars(args))

    from jaxinfer.serve.server import serve

    return serve(engine, server)
