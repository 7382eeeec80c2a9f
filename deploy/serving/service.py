"""The models a server holds: loaded, answered, and exchanged for a newer build without a failed request."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deploy.serving.batching import Limits, Queue
from deploy.serving.loading import Loaded, load, stamp_of
from deploy.serving.protocol import RequestError
from targets.errors import DeployError, UsageError

Array = np.ndarray[Any, Any]

SHORT_MS = 1.0
"""Calls shorter than this run in the server's own loop: handing them to a thread costs more."""
LOOK_S = 1.0
log = logging.getLogger("edge-deploy")
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("requests", "Requests by model and status.", ["model", "status"], **options)
        self.seconds = Histogram(
            "request_seconds",
            "From the body's last byte to the answer.",
            ["model"],
            buckets=BUCKETS,
            **options,
        )
        self.rows = Histogram(
            "batch_rows", "Rows that shared a call.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64), **options
        )
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", ["model"], **options)
        self._by_status: dict[tuple[str, int], Counter] = {}
        self.reloads = Counter("reloads", "Builds loaded anew.", ["model", "outcome"], **options)

    def request(self, model: str, status: int) -> None:
        """Counts one."""
        counter = self._by_status.get((model, status))
        if counter is None:
            counter = self._by_status[model, status] = self.requests.labels(model, status)
        counter.inc()


class Model:
    """One open build behind its queue, or without one where calls are short."""

    def __init__(self, loaded: Loaded, limits: Limits, metrics: Metrics) -> None:
        self.loaded = loaded
        self._seconds = metrics.seconds.labels(loaded.name)
        self._queue: Queue | None = None
        if loaded.median_ms is None or loaded.median_ms >= SHORT_MS:
            rows = metrics.rows.labels(loaded.name)
            shared = replace(limits, rows=loaded.manifest.recommended.shared_rows or 1)
            self._queue = Queue(loaded.session.run, shared, rows.observe)
            metrics.waiting.labels(loaded.name).set_function(
                lambda: self._queue.waiting if self._queue else 0
            )

    async def infer(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The answer to one request."""
        started = time.perf_counter()
        if self._queue is None:
            answers = self.loaded.session.run(arrays)
        else:
            answers = await self._queue.submit(arrays)
        self._seconds.observe(time.perf_counter() - started)
        return answers

    async def close(self) -> None:
        """Answers what waits."""
        if self._queue is not None:
            await self._queue.close()


class Service:
    """All models by name; watches their folders and takes up new builds.

    Raises what `load` raises, and UsageError where two builds have one name.
    """

    def __init__(self, folders: list[Path], *, limits: Limits, threads: int | None = None) -> None:
        self._limits = limits
        self._threads = threads
        self.opened = tuple(self._open(folders).values())
        self._watch: asyncio.Task[None] | None = None
        self._refused: dict[Path, tuple[int, int]] = {}
        self.metrics = Metrics()
        self.models: dict[str, Model] = {}
        self.ready = False

    async def start(self) -> None:
        """Ready for requests."""
        self.models = {loaded.name: Model(loaded, self._limits, self.metrics) for loaded in self.opened}
        self.ready = True
        self._watch = asyncio.get_running_loop().create_task(self._look())

    async def stop(self) -> None:
        """No longer ready; answers what waits."""
        self.ready = False
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for model in self.models.values():
            await model.close()

    def find(self, name: str, version: str | None = None) -> Model:
        """The model of that name. Raises RequestError 404."""
        model = self.models.get(name)
        if model is None:
            raise RequestError(404, "", f"there is no model {name[:60]!r}")
        if version is not None and version != model.loaded.version:
            raise RequestError(
                404, "", f"{name} has no version {version[:60]!r}, only {model.loaded.version}"
            )
        return model

    def _open(self, folders: list[Path]) -> dict[str, Loaded]:
        opened: dict[str, Loaded] = {}
        for folder in folders:
            loaded = self._load(folder)
            if loaded.name in opened:
                raise UsageError(
                    f"two builds are called {loaded.name}",
                    found=f"{opened[loaded.name].folder} and {folder}",
                    expected="one build a name",
                    fix="build one of them with another [model] name",
                )
            opened[loaded.name] = loaded
        return opened

    def _load(self, folder: Path) -> Loaded:
        return load(folder, threads=self._threads)

    async def _look(self) -> None:
        """Loads a build anew when another manifest lies in its folder; a bad one leaves the old in place."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            for model in self._changed():
                folder, name = model.loaded.folder, model.loaded.name
                stamp = stamp_of(folder)
                try:
                    loaded = await loop.run_in_executor(None, self._load, folder)
                    if loaded.name != name:
                        raise RequestError(409, "", f"the new build is called {loaded.name}")
                except (DeployError, RequestError, OSError) as error:
                    self._refused[folder] = stamp
                    self.metrics.reloads.labels(name, "refused").inc()
                    log.error("reload of %s refused: %s", name, error)
                    continue
                self.models[name] = Model(loaded, self._limits, self.metrics)
                self.metrics.reloads.labels(name, "ok").inc()
                log.info("%s is now version %s", name, loaded.version)
                await model.close()

    def _changed(self) -> Iterator[Model]:
        for model in list(self.models.values()):
            folder = model.loaded.folder
            stamp = stamp_of(folder)
            if stamp not in (model.loaded.stamp, (0, 0), self._refused.get(folder)):
                yield model
