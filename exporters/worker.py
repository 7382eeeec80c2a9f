"""A process of its own that holds one artifact and imports nothing but its runtime.

Run as `python -P -m exporters.worker FD`; it speaks over the inherited socket FD: it receives
(method, arguments) and answers ("ok", value) or ("error", exit code, message).
"""

import contextlib
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from exporters.base import Session, find_runtime
from targets.errors import DeployError


class Worker:
    """The requests that the other side may make."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._prepared: Any = None
        self._base_bytes = 0

    def open(self, runtime: str, file: str, inputs: Any, outputs: Any, threads: int) -> None:
        """Loads an artifact; memory is counted from here, with the runtime's own library already in it."""
        exporter = find_runtime(runtime)
        exporter.load_runtime()
        _forget_peak()
        self._base_bytes = _resident_bytes()
        self._session = exporter.open(Path(file), inputs=inputs, outputs=outputs, threads=threads)

    def run(self, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs for one batch."""
        return self._loaded.run(inputs)

    def prepare(self, inputs: dict[str, np.ndarray[Any, Any]]) -> None:
        """Keeps the inputs that `time` calls with."""
        self._prepared = self._loaded.prepare(inputs)

    def time(self, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        call, prepared, clock = self._loaded.call, self._prepared, time.perf_counter_ns
        samples = []
        for _ in range(calls):
            start = clock()
            call(prepared)
            samples.append(clock() - start)
        return samples

    def set_threads(self, threads: int) -> None:
        """The runtime's threads from now on."""
        self._loaded.set_threads(threads)

    def supported_fraction(self) -> float:
        """The share of the graph that the runtime's own kernels take, where its session tells it."""
        fraction: float = self._loaded.supported_fraction()  # type: ignore[attr-defined]
        return fraction

    def peak_bytes(self) -> int:
        """How much the process's peak memory grew since the artifact began to load."""
        return max(_peak_bytes() - self._base_bytes, 0)

    @property
    def _loaded(self) -> Session:
        if self._session is None:
            raise RuntimeError("no artifact is open")
        return self._session


STATUS = Path("/proc/self/status")


def _forget_peak() -> None:
    """Lets Linux count the peak anew; elsewhere the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes() -> int:
    return _status("VmRSS") or _peak_bytes()


def _peak_bytes() -> int:
    if peak := _status("VmHWM"):
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int | None:
    """A field of Linux's account of this process, in bytes; None elsewhere."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def serve(connection: Connection) -> None:
    """Answers requests until the other side closes."""
    worker = Worker()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] = ("ok", getattr(worker, method)(*arguments))
        except DeployError as error:
            answer = ("error", error.exit_code, error.what, error.message)
        except Exception as error:  # the runtime's own errors reach the other side as text
            answer = ("error", 5, f"{type(error).__name__}: {error}", f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
