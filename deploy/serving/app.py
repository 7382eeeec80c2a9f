"""The HTTP side of a service: Open Inference Protocol v2, metrics, OpenAPI, and a page to try it on."""

import importlib.resources
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deploy.serving import metadata
from deploy.serving.front import Front, refusal_headers
from deploy.serving.gate import FAILURES, AppOptions, Gate
from deploy.serving.protocol import DATATYPES, RequestError
from deploy.serving.service import Model, Service

JSON = "application/json"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, options: AppOptions) -> Front:
    """The ASGI application; the service is started and stopped by the process around it."""
    gate = Gate(service, options)
    api = _Api(service, gate)
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
        ("/v2/models/{model}/example", api.example, "GET"),
        ("/v2/models/{model}/versions/{version}", api.metadata, "GET"),
        ("/v2/models/{model}/versions/{version}/ready", api.model_ready, "GET"),
        ("/v2/models/{model}/infer", api.infer, "GET"),
        ("/v2/models/{model}/versions/{version}/infer", api.infer, "GET"),
    ):
        routes.append(Route(path, api.guarded(handler), methods=[method]))
    return Front(Starlette(routes=routes), service, gate, options)


class _Api:
    """The handlers."""

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate

    def guarded(self, handler: Handler, *, secret: bool = True) -> Handler:
        """A handler whose errors are JSON, whose requests carry an id, and whose caller has the token."""

        async def call(request: Request) -> Response:
            started = time.perf_counter()
            identity = self._gate.identity(request.headers.get("x-request-id", ""))
            try:
                if secret:
                    self._gate.admit(request.headers.get("authorization", "").encode("latin-1"))
                response = await handler(request)
            except RequestError as error:
                response = _failed(error)
            except FAILURES as error:
                response = _failed(self._gate.failed(error, identity, request.url.path))
            response.headers["x-request-id"] = identity
            model = str(request.path_params.get("model", ""))
            path = request.url.path
            self._gate.tell(identity, request.method, path, model, response.status_code, started)
            return response

        return call

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """All models are open and the server does not go down."""
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Response:
        """Server metadata."""
        return _json(metadata.of_server(self._service, EXTENSIONS))

    async def index(self, request: Request) -> Response:
        """The models."""
        return _json(metadata.of_models(self._service))

    async def metadata(self, request: Request) -> Response:
        """A model's metadata."""
        return _json(metadata.of_model(self._model(request).loaded))

    async def model_ready(self, request: Request) -> Response:
        """A model's readiness."""
        self._model(request)
        return _json({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def infer(self, request: Request) -> Response:
        """POST alone is met, by the front."""
        raise RequestError(405, "method", f"is {request.method}, expected POST")

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


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)


def _failed(error: RequestError) -> Response:
    headers = {key.decode(): value.decode() for key, value in refusal_headers(error)}
    return Response(error.body(), status_code=error.status, headers=headers)


def _asset(name: str) -> bytes:
    return importlib.resources.files("deploy.serving").joinpath(name).read_bytes()
