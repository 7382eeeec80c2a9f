"""The process: uvicorn and, where asked for, gRPC in one loop; drained on SIGTERM, ended with exit code 0."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from deploy.serving.app import make_app
from deploy.serving.batching import Limits
from deploy.serving.gate import AppOptions
from deploy.serving.service import Service
from targets.errors import MissingRequirementError

if TYPE_CHECKING:
    from deploy.serving.grpc_server import GrpcServer

DRAIN_S = 20
KEEP_ALIVE_S = 15
log = logging.getLogger("edge-deploy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen and within which limits; no gRPC without a port for it."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    app: AppOptions = field(default_factory=AppOptions)
    tls_certificate: Path | None = None
    tls_key: Path | None = None


class _Server(uvicorn.Server):
    """uvicorn ends by the signal that stopped it; a drained server has done its work and ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service, grpc: "GrpcServer | None") -> None:
        super().__init__(config)
        self._service = service
        self._grpc = grpc

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """The models first, then all that asks them."""
        await self._service.start()
        if self._grpc is not None:
            await self._grpc.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains HTTP and gRPC at the same time, then the models."""
        grpc = self._grpc.stop(DRAIN_S) if self._grpc is not None else asyncio.sleep(0)
        await asyncio.gather(super().shutdown(sockets), grpc)
        if not self.force_exit:
            await self._service.stop()

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
        lifespan="off",
    )
    for loaded in service.opened:
        log.info("%s version %s (%s)", loaded.name, loaded.version, loaded.manifest.shipped_rung)
    scheme = "https" if options.tls_certificate else "http"
    log.info("listening on %s://%s:%s", scheme, *_shown(listening))
    _Server(config, service, _grpc(service, options)).run(sockets=[listening])


def _grpc(service: Service, options: ServeOptions) -> "GrpcServer | None":
    if options.grpc_port is None:
        return None
    from deploy.serving.grpc_server import GrpcServer, Listening

    address = Listening(
        host=options.host,
        port=options.grpc_port,
        tls_certificate=options.tls_certificate,
        tls_key=options.tls_key,
    )
    return GrpcServer(service, options.app, address)


def _shown(listening: socket.socket) -> tuple[str, int]:
    host, port = listening.getsockname()[:2]
    return f"[{host}]" if ":" in host else host, port


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
