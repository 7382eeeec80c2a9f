"""The HTTP side of a service: Open Inference Protocol v2, metrics, OpenAPI, and a page to try it on."""

import asyncio
import hmac
import importlib.resources
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from deploy.serving.protocol import DATATYPES, RequestError, parse, respond
from deploy.serving.service import Model, Service
from targets.errors import DeployError

JSON = "application/json"
HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
BODY_SECONDS = 30.0
RETRY_S = "1"
log = logging.getLogger("edge-deploy")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """The largest body in bytes, the bearer token, and whether each request is logged."""

    largest_body: int = 64 << 20
    token: str | None = None
    log_requests: bool = False


def make_app(service: Service, options: AppOptions) -> Starlette:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    api = _Api(service, options)
    open_routes = {
        "/v2/health/live": api.live,
        "/v2/health/ready": api.ready,
    }
    routes = [Route(path, api.guarded(handler, secret=False)) for path, handler in open_routes.items()]
    for path, handler, method in (
        ("/", api.page, "GET"),
        ("/favicon.ico", api.icon, "GET"),
        ("/page.js", api.script, "GET"),
        ("/page.css", api.style, "GET"),
        ("/openapi.json", api.openapi, "GET"),
        ("/metrics", api.metrics, "GET"),
        ("/v2", api.server, "GET"),
        ("/v2/repository/index", api.index, "POST"),
        ("/v2/models/{model}", api.metadata, "GET"),
        ("/v2/models/{model}/ready", api.model_ready, "GET"),
        ("/v2/models/{model}/infer", api.infer, "POST"),
        ("/v2/models/{model}/example", api.example, "GET"),
        ("/v2/models/{model}/versions/{version}", api.metadata, "GET"),
        ("/v2/models/{model}/versions/{version}/ready", api.model_ready, "GET"),
        ("/v2/models/{model}/versions/{version}/infer", api.infer, "POST"),
    ):
        routes.append(Route(path, api.guarded(handler), methods=[method]))
    return Starlette(routes=routes, lifespan=lifespan)


class _Api:
    """The handlers."""

    def __init__(self, service: Service, options: AppOptions) -> None:
        self._service = service
        self._options = options

    def guarded(self, handler: Handler, *, secret: bool = True) -> Handler:
        """A handler whose errors are JSON, whose requests carry an id, and whose caller has the token."""

        async def call(request: Request) -> Response:
            started = time.perf_counter()
            given = request.headers.get("x-request-id", "")
            identity = given if given.isascii() and given.isprintable() and 0 < len(given) <= 100 else ""
            identity = identity or uuid.uuid4().hex
            try:
                if secret:
                    self._check_token(request)
                response = await handler(request)
            except RequestError as error:
                response = _failed(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except (DeployError, RuntimeError, MemoryError) as error:
                log.error(json.dumps({"id": identity, "path": request.url.path, "error": str(error)[:500]}))
                response = _failed(RequestError(500, "", "the model failed"))
            response.headers["x-request-id"] = identity
            model = request.path_params.get("model")
            if model in self._service.models:
                self._service.metrics.requests.labels(model, response.status_code).inc()
            if self._options.log_requests or response.status_code >= 500:
                line = {
                    "id": identity,
                    "method": request.method,
                    "path": request.url.path,
                    "status": response.status_code,
                    "ms": round(1000 * (time.perf_counter() - started), 3),
                }
                log.info(json.dumps(line))
            return response

        return call

    def _check_token(self, request: Request) -> None:
        token = self._options.token
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "authorization", "is no valid bearer token")

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """All models are open and the server does not go down."""
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Response:
        """Server metadata."""
        version = next(iter(self._service.models.values())).loaded.manifest.environment.packages
        return _json(
            {"name": "edge-deploy", "version": version.get("edge-deploy", ""), "extensions": EXTENSIONS}
        )

    async def index(self, request: Request) -> Response:
        """The models."""
        await self._body(request)
        models = [model.loaded for model in self._service.models.values()]
        return _json([{"name": m.name, "version": m.version, "state": "READY", "reason": ""} for m in models])

    async def metadata(self, request: Request) -> Response:
        """A model's inputs and outputs; dynamic dimensions are -1."""
        loaded = self._model(request).loaded
        manifest = loaded.manifest
        return _json(
            {
                "name": loaded.name,
                "versions": [loaded.version],
                "platform": f"edge-deploy_{manifest.runtime}",
                "inputs": [_tensor(entry) for entry in manifest.inputs],
                "outputs": [_tensor(entry) for entry in manifest.outputs],
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """A model's readiness."""
        self._model(request)
        return _json({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def infer(self, request: Request) -> Response:
        """Answers one request."""
        model = self._model(request)
        body = await self._body(request)
        loaded = model.loaded
        parsed = parse(body, request.headers.get(HEADER_LENGTH), loaded.specs, loaded.outputs)
        answers = await model.infer(parsed.arrays)
        content, header = respond(answers, parsed, model=loaded.name, version=loaded.version)
        if header is None:
            return Response(content, media_type=JSON)
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header)})

    async def example(self, request: Request) -> Response:
        """A request that works: the first sample of the golden pair."""
        loaded = self._model(request).loaded
        inputs = []
        for spec in loaded.specs:
            array = loaded.golden[spec.name]
            array = array[:1] if isinstance(spec.shape[0], str) else array[: spec.shape[0]]
            data = array.ravel().tolist()
            shape, datatype = list(array.shape), DATATYPES[spec.dtype]
            inputs.append({"name": spec.name, "shape": shape, "datatype": datatype, "data": data})
        return _json({"inputs": inputs})

    async def metrics(self, request: Request) -> Response:
        """Prometheus's text format."""
        return Response(generate_latest(self._service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        from deploy.serving.openapi import document

        return _json(document(self._service))

    async def page(self, request: Request) -> Response:
        """The page to try the models on."""
        policy = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        return Response(
            _asset("page.html"), media_type="text/html", headers={"content-security-policy": policy}
        )

    async def icon(self, request: Request) -> Response:
        """None."""
        return Response(status_code=204)

    async def script(self, request: Request) -> Response:
        """The page's script."""
        return Response(_asset("page.js"), media_type="text/javascript")

    async def style(self, request: Request) -> Response:
        """The page's style."""
        return Response(_asset("page.css"), media_type="text/css")

    def _model(self, request: Request) -> Model:
        return self._service.find(request.path_params["model"], request.path_params.get("version"))

    async def _body(self, request: Request) -> bytes:
        """The body within its limits of size and time. Raises RequestError 413 and 408."""
        limit = self._options.largest_body
        stated = request.headers.get("content-length", "0")
        if stated.isdigit() and int(stated[:20]) > limit:
            raise RequestError(413, "body", f"has {stated[:20]} bytes, at most {limit} are taken")
        try:
            return await asyncio.wait_for(_read(request, limit), BODY_SECONDS)
        except TimeoutError:
            raise RequestError(408, "body", f"did not arrive within {BODY_SECONDS:g} s") from None


async def _read(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RequestError(413, "body", f"is larger than {limit} bytes")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _tensor(entry: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in entry.shape]
    return {"name": entry.name, "datatype": DATATYPES[entry.dtype], "shape": shape}


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)


def _failed(error: RequestError) -> Response:
    headers = {"retry-after": RETRY_S} if error.status == 429 else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error.body(), status_code=error.status, media_type=JSON, headers=headers)


def _asset(name: str) -> bytes:
    return importlib.resources.files("deploy.serving").joinpath(name).read_bytes()
