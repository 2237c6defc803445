"""Starting, running and ending the server: what `jaxinfer serve` and `python -m jaxinfer.serve` do once flags are read.

The socket is bound first (a port in use is told at once), then the engine loads in its own thread while /health already answers 503
with the stage. Ready, it says on stderr where it is and what to paste. SIGTERM drains: no new requests, open ones go on for
`drain_seconds`; a second SIGTERM, or Ctrl-C, ends at once. An engine that fails takes the process down. stdout stays empty.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from jaxinfer.config import ConfigError, EngineConfig, ServerConfig
from jaxinfer.console import StageBar
from jaxinfer.serve import banner
from jaxinfer.serve.app import create_app
from jaxinfer.serve.context import Context
from jaxinfer.serve.loop import EngineLoop, Factory, Progress
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.phase import Phase, Stage
from jaxinfer.serve.protocol import protocol
from jaxinfer.serve.shadow import Shadow

OK, FAILED, INTERRUPTED = 0, 1, 130
STOP_SECONDS = 5.0  # how long the engine's thread may take to end
KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048

logger = logging.getLogger(__name__)


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until told to stop. Returns the exit code: 0 after a drain, 1 when the engine failed, 130 after Ctrl-C.

    Raises:
        ConfigError: the address cannot be listened on, the key is empty, or drafts are to be checked where there are none.
        ConfigError, CheckpointError, TokenizerError: the model cannot be run as asked.
    """
    if server.api_key == "":
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to serve without one")
    if server.shadow_check and engine.speculation.speculate == "off" and engine.execution.bundle is None:  # a bundle may bring drafts
        raise ConfigError("--shadow-check has nothing to check with --speculate off; choose a way to draft, or leave it out")
    listening = bind(server.host, server.port)

    def factory(progress: Progress) -> Any:
        from jaxinfer.engine.engine import Engine  # here, in the engine's thread: importing jax takes a while

        made = Engine(engine, progress=progress)
        if made.tokenizer is None:
            raise ConfigError(f"{engine.model.model!r} has no tokenizer, so it cannot be served; it is for benchmarks")
        if server.shadow_check and made.speculator is None:
            raise ConfigError("--shadow-check has nothing to check: the bundle was planned without drafts; plan one with them")
        made.tokenizer.token_bytes(0)  # builds the tokenizer's tables here, not on the event loop
        return made

    return run(factory, server, listening, model=engine.model.model)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use or not ours to take, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise ConfigError(f"--host {host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all it has") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if isinstance(error, PermissionError):
            raise ConfigError(f"port {port} may not be used without privileges; choose one above 1023 with --port") from None
        reason = (error.strerror or "refused").lower()
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; stop what uses it, or choose another with --port") from None
    return listening


def run(factory: Factory, config: ServerConfig, listening: socket.socket, *, model: str) -> int:
    """Load what `factory` makes and serve it on a socket until a signal ends it."""
    engine = EngineLoop(factory, shadow=Shadow(config.shadow_check))
    metrics = Metrics(lambda: engine.loaded, config.served_model_name)
    engine.observer = metrics.observe
    context = Context(config, engine, metrics)
    server = Server(context, listening)
    banner.starting(model, config, listening.getsockname()[1])
    with StageBar() as bar:
        engine.on_change = Teller(context, bar, server)
        engine.start()
        server.run(sockets=[listening])
    return _end(context, server)


class Teller:
    """Shows loading on stderr and, once ready, the banner; stops the server when the engine fails."""

    def __init__(self, context: Context, bar: StageBar, server: Server) -> None:
        self._context = context
        self._bar = bar
        self._server = server
        self._begun = time.monotonic()

    def __call__(self, change: Phase | Stage) -> None:
        """The phase has changed, or a stage moved on (called from the engine's threads)."""
        if isinstance(change, Stage):
            self._bar(change.name, change.done, change.total)
        elif change is Phase.READY:
            gc.collect()  # what is there now stays: to look through it again would hold up a step for 0.1 s and more
            gc.freeze()
            self._bar.__exit__(None, None, None)
            banner.ready(self._context, self._server.port, time.monotonic() - self._begun)
        elif change is Phase.FAILED:
            self._server.should_exit = True


class Server(uvicorn.Server):
    """uvicorn with our way of ending: SIGTERM drains, a second one or Ctrl-C ends now."""

    def __init__(self, context: Context, listening: socket.socket) -> None:
        config = uvicorn.Config(
            create_app(context), http=protocol(), log_config=None, access_log=False, ws="none", lifespan="on", server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1, proxy_headers=False, backlog=BACKLOG,
        )  # fmt: skip
        super().__init__(config)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self.port = listening.getsockname()[1]
        self.code = OK
        self._context = context
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come: SIGTERM for the first time drains, anything else ends now, one more does not even say goodbye."""
        engine = self._context.engine
        if sig == signal.SIGTERM and self._deadline is None and engine.phase is Phase.READY:
            self._deadline = time.monotonic() + self._context.config.drain_seconds
            engine.drain()
            return
        self.code = INTERRUPTED if sig == signal.SIGINT else OK
        self.force_exit = self.should_exit
        self._leave()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: a drain ends when no call is open, or its time is over."""
        draining = self._deadline is not None and not self.should_exit
        if draining and (not self._context.engine.open_calls or time.monotonic() > (self._deadline or 0.0)):
            self._leave()
        return await super().on_tick(counter)

    def _leave(self) -> None:
        """Stop the engine, which ends open streams with an error event, and let uvicorn close what is left."""
        self._context.engine.stop(0.0)
        self.should_exit = True


def _end(context: Context, server: Server) -> int:
    """Stop the engine and settle the exit code; a thread that cannot be stopped (it loads, or hangs) does not keep the process."""
    engine = context.engine
    failure = engine.failure
    if failure is not None and engine.loaded is None and isinstance(failure, Exception):
        raise failure
    code = FAILED if failure is not None else server.code
    if failure is not None:
        banner.say("jaxinfer: error: the engine failed; the log above says why")
    elif not engine.stop(STOP_SECONDS if engine.phase is not Phase.LOADING else 0.1):
        logger.debug("the engine's thread is still busy; leaving without it")
        if threading.current_thread() is threading.main_thread():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code
