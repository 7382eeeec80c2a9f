"""What every request passes: an id, the token, a count and a line in the log."""

import hmac
import json
import logging
import time
import uuid
from dataclasses import dataclass

from deploy.serving.protocol import RequestError
from deploy.serving.service import Service
from targets.errors import DeployError

LONGEST_ID = 100
log = logging.getLogger("edge-deploy")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """The largest body in bytes, the bearer token, and whether each request is logged."""

    largest_body: int = 64 << 20
    token: str | None = None
    log_requests: bool = False


class Gate:
    """Admits requests and tells of them."""

    def __init__(self, service: Service, options: AppOptions) -> None:
        self._service = service
        self._options = options
        self._expected = f"Bearer {options.token}".encode() if options.token is not None else None

    def identity(self, given: str) -> str:
        """The caller's id where it is short and printable, else one of our own."""
        if given and len(given) <= LONGEST_ID and given.isascii() and given.isprintable():
            return given
        return uuid.uuid4().hex

    def admit(self, authorization: bytes) -> None:
        """Raises RequestError 401 for a caller without the token."""
        if self._expected is not None and not hmac.compare_digest(authorization, self._expected):
            raise RequestError(401, "authorization", "is no valid bearer token")

    def failed(self, error: BaseException, identity: str, path: str) -> RequestError:
        """What a caller is told of an error that is not theirs; the log gets the rest."""
        log.error(json.dumps({"id": identity, "path": path, "error": str(error)[:500]}))
        return RequestError(500, "", "the model failed")

    def tell(self, identity: str, method: str, path: str, model: str, status: int, started: float) -> None:
        """Counts a finished request, and writes its line where that was asked for or it failed."""
        if model in self._service.models:
            self._service.metrics.request(model, status)
        if self._options.log_requests or status >= 500:
            spent = round(1000 * (time.perf_counter() - started), 3)
            line = {"id": identity, "method": method, "path": path, "status": status, "ms": spent}
            log.info(json.dumps(line))


FAILURES = (DeployError, RuntimeError, MemoryError)
"""What a model may raise for a request that was checked."""
