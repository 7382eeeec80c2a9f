"""The ASGI application: requests for answers are met here, all others by Starlette behind it.

A router, its request objects and the layers around them cost more CPU than a small model does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from deploy.serving.gate import FAILURES, AppOptions, Gate
from deploy.serving.protocol import RequestError, parse, respond
from deploy.serving.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0
RETRY_S = b"1"
MODELS, VERSIONS, INFER = "/v2/models/", "versions", "infer"
HEADER_LENGTH = b"inference-header-content-length"
JSON, BINARY = b"application/json", b"application/octet-stream"


class _GoneError(Exception):
    """The caller went away."""


class Front:
    """Answers POST /v2/models/NAME[/versions/V]/infer; hands the rest on."""

    def __init__(self, behind: Application, service: Service, gate: Gate, options: AppOptions) -> None:
        self._behind = behind
        self._service = service
        self._gate = gate
        self._largest = options.largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        wanted = _asked(scope) if scope["type"] == "http" else None
        if wanted is None:
            await self._behind(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        identity = self._gate.identity(headers.get(b"x-request-id", b"").decode("latin-1"))
        name, version = wanted
        try:
            self._gate.admit(headers.get(b"authorization", b""))
            status, body, extra = await self._answer(name, version, headers, receive)
        except _GoneError:
            self._gate.tell(identity, "POST", scope["path"], name, 499, started)
            return
        except RequestError as error:
            status, body, extra = error.status, error.body(), refusal_headers(error)
        except FAILURES as error:
            told = self._gate.failed(error, identity, scope["path"])
            status, body, extra = told.status, told.body(), refusal_headers(told)
        self._gate.tell(identity, "POST", scope["path"], name, status, started)
        lines = [
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", identity.encode()),
            *extra,
        ]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": body})

    async def _answer(
        self, name: str, version: str | None, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        model = self._service.find(name, version)
        body = await read_body(headers.get(b"content-length", b"0"), receive, self._largest)
        loaded = model.loaded
        length = headers.get(HEADER_LENGTH)
        text = None if length is None else length.decode("latin-1")
        parsed = parse(body, text, loaded.specs, loaded.outputs)
        answers = await model.infer(parsed.arrays)
        content, header = respond(answers, parsed, model=loaded.name, version=loaded.version)
        if header is None:
            return 200, content, [(b"content-type", JSON)]
        return 200, content, [(b"content-type", BINARY), (HEADER_LENGTH, str(header).encode())]


def refusal_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """The headers of a refusal: its type, when to come again, how to be admitted."""
    lines = [(b"content-type", JSON)]
    if error.status == 429:
        lines.append((b"retry-after", RETRY_S))
    if error.status == 401:
        lines.append((b"www-authenticate", b"Bearer"))
    return lines


async def read_body(stated: bytes, receive: Receive, limit: int) -> bytes:
    """A body within its limits of size and time. Raises RequestError 413 and 408."""
    if stated.isdigit() and int(stated[:20]) > limit:
        raise RequestError(413, "body", f"has {stated[:20].decode()} bytes, at most {limit} are taken")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _parts(receive, limit)
    except TimeoutError:
        raise RequestError(408, "body", f"did not arrive within {BODY_SECONDS:g} s") from None


async def _parts(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise RequestError(413, "body", f"is larger than {limit} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _asked(scope: Scope) -> tuple[str, str | None] | None:
    """The model and version that an infer request names; None for any other request."""
    path: str = scope["path"]
    if scope["method"] != "POST" or not path.startswith(MODELS):
        return None
    match path[len(MODELS) :].split("/"):
        case [name, word] if word == INFER:
            return name, None
        case [name, between, version, word] if between == VERSIONS and word == INFER:
            return name, version
    return None
