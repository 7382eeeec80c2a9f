"""Eager torch in a process of its own: what a model costs before anything is done to it."""

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]


class EagerSession:
    """A project's float32 module under inference_mode, with one thread by default; ends with the block.

    With `compiled`, through torch.compile and its defaults.
    """

    def __init__(self, project: Path, *, threads: int = 1, compiled: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(project, theirs, threads, compiled), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(5)

    def prepare(self, inputs: Arrays) -> None:
        """The batch that `time` calls with."""
        self._ask(dict(inputs))

    def time(self, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        samples: list[int] = self._ask(calls)
        return samples

    def _ask(self, request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()


def _serve(project: Path, connection: Connection, threads: int, compiled: bool) -> None:
    """Arrays are kept, a number is so many timed calls."""
    import torch

    from deploy.model import load_module
    from deploy.project import load
    from exporters.capture import order_inputs

    torch.set_num_threads(threads)
    settings = load(project)
    module = load_module(settings)
    names = [spec.name for spec in order_inputs(module, settings.specs())[0]]
    called: Any = torch.compile(module) if compiled else module
    tensors: list[torch.Tensor] = []
    with torch.inference_mode():
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            if isinstance(request, dict):
                tensors = [torch.from_numpy(np.ascontiguousarray(request[name])) for name in names]
                connection.send(None)
            else:
                connection.send(_timed(called, tensors, request))


def _timed(module: Any, tensors: list[Any], calls: int) -> list[int]:
    clock = time.perf_counter_ns
    samples = []
    for _ in range(calls):
        start = clock()
        module(*tensors)
        samples.append(clock() - start)
    return samples
