"""The process: uvicorn around the application, drained and ended with exit code 0 on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from deploy.serving.app import make_app
from deploy.serving.batching import Limits
from deploy.serving.gate import AppOptions
from deploy.serving.service import Service
from targets.errors import MissingRequirementError

DRAIN_S = 20
KEEP_ALIVE_S = 15
log = logging.getLogger("edge-deploy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen and within which limits."""

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    app: AppOptions = field(default_factory=AppOptions)
    tls_certificate: Path | None = None
    tls_key: Path | None = None


class _Server(uvicorn.Server):
    """uvicorn ends by the signal that stopped it; a drained server has done its work and ends with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Only asks to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def serve(folders: list[Path], options: ServeOptions) -> None:
    """Serves builds until SIGTERM or Ctrl-C.

    Raises what opening a build raises, and MissingRequirementError where the address cannot be had.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    service = Service(folders, limits=options.limits, threads=options.threads)
    listening = _bound(options.host, options.port)
    config = uvicorn.Config(
        make_app(service, options.app),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        lifespan="on",
    )
    scheme = "https" if options.tls_certificate else "http"
    host, port = listening.getsockname()[:2]
    for loaded in service.opened:
        log.info("%s version %s (%s)", loaded.name, loaded.version, loaded.manifest.shipped_rung)
    log.info("listening on %s://%s:%s", scheme, f"[{host}]" if ":" in host else host, port)
    _Server(config).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, before anything else starts."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise MissingRequirementError(
            f"cannot listen on {host} port {port}",
            found=error.strerror or str(error),
            expected="an address of this machine and a free port",
            fix="choose another --host or --port",
        ) from error
    return bound
