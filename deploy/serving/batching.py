"""Requests to one model: run at once where a call is short, else queued, joined and run beside the loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.serving.protocol import RequestError

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Run = Callable[[Arrays], dict[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many rows are joined, how long a request waits for others, how many wait, how long in all."""

    rows: int = 1
    window_s: float = 0.002
    waiting: int = 256
    seconds: float = 30.0


@dataclass(slots=True, kw_only=True)
class _Job:
    arrays: Arrays
    rows: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    answer: "asyncio.Future[dict[str, Array]]"
    born: float = field(default=0.0)


class Queue:
    """A bounded queue before one thread that runs the model; what leaves it together shares a call."""

    def __init__(self, run: Run, limits: Limits, on_batch: Callable[[int], None] = lambda rows: None) -> None:
        self._run = run
        self._limits = limits
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task = asyncio.get_running_loop().create_task(self._work())

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._jobs)

    async def submit(self, arrays: Arrays) -> dict[str, Array]:
        """The model's answer. Raises RequestError 429 where too many wait, 504 where it takes too long."""
        if len(self._jobs) >= self._limits.waiting:
            raise RequestError(429, "", f"{self._limits.waiting} requests wait already")
        loop = asyncio.get_running_loop()
        job = _Job(
            arrays=arrays,
            rows=len(next(iter(arrays.values()))) if self._limits.rows > 1 else 1,
            shapes=tuple((name, array.shape[1:]) for name, array in sorted(arrays.items())),
            answer=loop.create_future(),
            born=loop.time(),
        )
        self._jobs.append(job)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await job.answer
        except TimeoutError:
            raise RequestError(504, "", f"no answer within {self._limits.seconds:g} s") from None

    async def close(self) -> None:
        """Answers what waits, then ends."""
        while self._jobs or self._busy:
            await asyncio.sleep(0.005)
        self._task.cancel()
        self._thread.shutdown(wait=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._busy = True
            batch = await self._collect()
            if batch:
                self._on_batch(sum(job.rows for job in batch))
                await self._carry_out(batch, loop)
            self._busy = False

    async def _carry_out(self, batch: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        try:
            answers = await loop.run_in_executor(self._thread, self._answer, batch)
        except Exception as error:  # each of them is told
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        for job, answer in zip(batch, answers, strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)

    async def _collect(self) -> list[_Job]:
        """The next jobs that fit together. Those whose client gave up are dropped."""
        while self._jobs and self._jobs[0].answer.done():
            self._jobs.popleft()
        if not self._jobs:
            self._arrived.clear()
            return []
        first = self._jobs.popleft()
        batch, rows = [first], first.rows
        until = first.born + self._limits.window_s
        loop = asyncio.get_running_loop()
        while rows < self._limits.rows:
            if not self._jobs:
                self._arrived.clear()
                left = until - loop.time()
                if left <= 0:
                    break
                try:
                    await asyncio.wait_for(self._arrived.wait(), left)
                except TimeoutError:
                    break
                continue
            if self._jobs[0].shapes != first.shapes or rows + self._jobs[0].rows > self._limits.rows:
                break
            job = self._jobs.popleft()
            if not job.answer.done():
                batch.append(job)
                rows += job.rows
        return batch

    def _answer(self, batch: list[_Job]) -> list[dict[str, Array]]:
        """Runs in the model's thread."""
        if len(batch) == 1:
            return [self._run(batch[0].arrays)]
        joined = {name: np.concatenate([job.arrays[name] for job in batch]) for name in batch[0].arrays}
        answers = self._run(joined)
        parts, start = [], 0
        for job in batch:
            parts.append({name: array[start : start + job.rows] for name, array in answers.items()})
            start += job.rows
        return parts
