"""The gRPC side of a service: Open Inference Protocol v2 in the loop that HTTP is served in."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from deploy.serving import metadata
from deploy.serving.gate import AppOptions, Gate
from deploy.serving.grpc_messages import message
from deploy.serving.grpc_protocol import decoded, parse, respond
from deploy.serving.protocol import RequestError
from deploy.serving.service import Service
from targets.errors import MissingRequirementError

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ["model_repository"]
OPEN = ("ServerLive", "ServerReady")
"""Methods that ask for no token."""
STREAMS = 1000
CALLS = 256
"""At once, over all connections: gRPC holds their messages before anybody looks at a token."""
MOST_BYTES = 2**31 - 1
"""gRPC's options are C integers."""
"""Calls at once on one connection; further ones wait at the caller."""
KEEP_ALIVE_MS = 60_000
ARRIVED_S, REFUSING_S = 0.2, 0.3
"""How long a server that goes down still answers, then refuses."""
GONE = 499
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""The code of a refusal's HTTP status; any other is INVALID_ARGUMENT."""
Answer = Callable[[Any], Awaitable[bytes]]
Call = Callable[[bytes, Any], Awaitable[bytes]]
log = logging.getLogger("edge-deploy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where to listen, and the PEM files of TLS where it is wanted."""

    host: str
    port: int
    tls_certificate: Path | None = None
    tls_key: Path | None = None


class GrpcServer:
    """Answers the service's methods between `start` and `stop`."""

    def __init__(self, service: Service, options: AppOptions, listening: Listening) -> None:
        self._methods = _Methods(service)
        self._gate = Gate(service, options)
        self._largest = options.largest_body
        self._listening = listening
        self._server: Any = None
        self._closing = False

    async def start(self) -> None:
        """Listens. Raises MissingRequirementError where the address cannot be had."""
        self._server = grpc.aio.server(options=_options(self._largest), maximum_concurrent_rpcs=CALLS)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(name, answer))
            for name, answer in self._methods.by_name().items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = _bind(self._server, self._listening)
        await self._server.start()
        scheme = "grpcs" if self._listening.tls_certificate else "grpc"
        log.info("listening on %s://%s", scheme, _address(self._listening.host, port))

    async def stop(self, seconds: float) -> None:
        """Answers what has arrived, refuses what comes later, then ends; waits at most so long for answers.

        grpc cancels the calls that it has not handed over yet when it is stopped, so that comes last.
        """
        await asyncio.sleep(ARRIVED_S)
        self._closing = True
        await asyncio.sleep(REFUSING_S)
        await self._server.stop(seconds)

    def _guarded(self, name: str, answer: Answer) -> Call:
        """A method on bytes: an id for each call, the token, errors by their codes, a line in the log.

        Bytes, because a request that is no message would else be refused as an error of the server's.
        """
        path = f"/{SERVICE}/{name}"

        async def call(data: bytes, context: Any) -> bytes:
            started = time.perf_counter()
            given = dict(context.invocation_metadata() or ())
            identity = self._gate.identity(given.get("x-request-id", ""))
            context.set_trailing_metadata((("x-request-id", identity),))
            request, status = None, 200
            try:
                if self._closing:
                    raise RequestError(503, "", "the server goes down")
                if name not in OPEN:
                    self._gate.admit(given.get("authorization", "").encode())
                request = decoded(f"{name}Request", data)
                return await answer(request)
            except asyncio.CancelledError:
                status = GONE
                raise
            except Exception as error:  # grpc would tell the caller the text of any
                told = error if isinstance(error, RequestError) else self._gate.failed(error, identity, path)
                status = told.status
                await context.abort(CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT), str(told))
                raise
            finally:
                self._gate.tell(identity, "gRPC", path, _model_of(request), status, started)

        return call


class _Methods:
    """The service's methods: a request's message in, an answer's bytes out."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def by_name(self) -> dict[str, Answer]:
        """As the protocol calls them."""
        return {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "RepositoryIndex": self.repository_index,
        }

    async def server_live(self, request: Any) -> bytes:
        """The process answers."""
        return _packed("ServerLiveResponse", live=True)

    async def server_ready(self, request: Any) -> bytes:
        """All models are open and the server does not go down."""
        return _packed("ServerReadyResponse", ready=self._service.ready)

    async def model_ready(self, request: Any) -> bytes:
        """A model's readiness."""
        self._service.find(request.name, request.version or None)
        return _packed("ModelReadyResponse", ready=self._service.ready)

    async def server_metadata(self, request: Any) -> bytes:
        """Name, version and extensions."""
        return _packed("ServerMetadataResponse", **metadata.of_server(self._service, EXTENSIONS))

    async def model_metadata(self, request: Any) -> bytes:
        """A model's inputs and outputs."""
        model = self._service.find(request.name, request.version or None)
        return _packed("ModelMetadataResponse", **metadata.of_model(model.loaded))

    async def model_infer(self, request: Any) -> bytes:
        """The answer to a request."""
        model = self._service.find(request.model_name, request.model_version or None)
        loaded = model.loaded
        parsed = parse(request, loaded.specs, loaded.outputs)
        answers = await model.infer(parsed.arrays)
        return respond(answers, parsed, model=loaded.name, version=loaded.version)

    async def repository_index(self, request: Any) -> bytes:
        """The models."""
        return _packed("RepositoryIndexResponse", models=metadata.of_models(self._service))


def _packed(name: str, /, **fields: Any) -> bytes:
    return bytes(message(name)(**fields).SerializeToString())


def _model_of(request: Any) -> str:
    """The model that a request names, "" where it names none."""
    return str(getattr(request, "model_name", getattr(request, "name", "")))


def _options(largest: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a port that another server has is refused
        ("grpc.max_receive_message_length", min(largest, MOST_BYTES)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.keepalive_time_ms", KEEP_ALIVE_MS),
    ]


def _bind(server: Any, listening: Listening) -> int:
    address = _address(listening.host, listening.port)
    try:
        if listening.tls_certificate is None or listening.tls_key is None:
            port = server.add_insecure_port(address)
        else:
            pair = (listening.tls_key.read_bytes(), listening.tls_certificate.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except (RuntimeError, OSError) as error:
        raise MissingRequirementError(
            f"gRPC cannot listen on {listening.host} port {listening.port}",
            found=str(error)[:200],
            expected="an address of this machine and a free port",
            fix="choose another --host or --grpc-port",
        ) from error
    return int(port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
