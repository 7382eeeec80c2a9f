"""The queue before a model: bounded, joining what fits, answering everything once."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from deploy.serving.batching import Limits, Queue
from deploy.serving.protocol import RequestError


class Model:
    """Doubles its input; counts the rows of each call and can be held."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, arrays: Any) -> dict[str, np.ndarray]:
        self.go.wait(10)
        self.calls.append(len(arrays["x"]))
        if (arrays["x"] < 0).any():
            raise RuntimeError("negative")
        return {"y": arrays["x"] * 2}


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)[:, None]}


def served(work: Callable[[Queue], Coroutine[Any, Any, Any]], model: Model, **limits: Any) -> Any:
    async def run() -> Any:
        queue = Queue(model, Limits(**limits))
        try:
            return await work(queue)
        finally:
            model.go.set()
            await queue.close()

    return asyncio.run(run())


def test_requests_that_wait_together_share_a_call_and_each_gets_its_own_rows() -> None:
    model = Model()

    async def work(queue: Queue) -> list[Any]:
        return await asyncio.gather(*(queue.submit(rows(*range(n), n)) for n in (1, 0, 2, 3)))

    answers = served(work, model, rows=16, window_s=0.05)
    assert [answer["y"].ravel().tolist() for answer in answers] == [
        [0, 2], [0], [0, 2, 4], [0, 2, 4, 6],
    ]  # fmt: skip
    assert model.calls == [10]


def test_no_call_has_more_rows_than_allowed_and_other_shapes_do_not_join() -> None:
    model = Model()

    async def work(queue: Queue) -> None:
        wide = {"x": np.ones((1, 3), np.float32)}
        await asyncio.gather(*(queue.submit(rows(1)) for _ in range(7)), queue.submit(wide))

    served(work, model, rows=4, window_s=0.02)
    assert sorted(model.calls) == [1, 3, 4]


def test_without_sharing_every_request_is_a_call_of_its_own() -> None:
    model = Model()

    async def work(queue: Queue) -> None:
        await asyncio.gather(*(queue.submit(rows(1, 2)) for _ in range(3)))

    served(work, model, rows=1)
    assert model.calls == [2, 2, 2]


def test_a_request_alone_does_not_wait_longer_than_the_window() -> None:
    model = Model()
    assert served(lambda queue: queue.submit(rows(3)), model, rows=64, window_s=0.01)["y"].item() == 6


def test_beyond_the_bound_requests_are_refused_and_those_before_it_answered() -> None:
    model = Model()

    async def work(queue: Queue) -> list[Any]:
        model.go.clear()
        held = [asyncio.create_task(queue.submit(rows(0)))]
        await asyncio.sleep(0.1)  # the first is being run
        held += [asyncio.create_task(queue.submit(rows(n))) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as told:
            await queue.submit(rows(9))
        assert told.value.status == 429
        model.go.set()
        return await asyncio.gather(*held)

    answers = served(work, model, rows=1, waiting=3)
    assert [answer["y"].item() for answer in answers] == [0, 2, 4, 6]


def test_a_request_that_takes_too_long_is_told_and_never_run_later() -> None:
    model = Model()

    async def work(queue: Queue) -> None:
        model.go.clear()
        first = asyncio.create_task(queue.submit(rows(1)))
        await asyncio.sleep(0.02)
        with pytest.raises(RequestError) as told:
            await queue.submit(rows(2))
        assert told.value.status == 504
        model.go.set()
        with pytest.raises(RequestError):
            await first

    served(work, model, rows=1, seconds=0.15)
    assert model.calls == [1]


def test_a_client_that_gives_up_is_dropped_from_the_queue() -> None:
    model = Model()

    async def work(queue: Queue) -> None:
        model.go.clear()
        first = asyncio.create_task(queue.submit(rows(1)))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(queue.submit(rows(2)))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0)
        model.go.set()
        await first

    served(work, model, rows=1)
    assert model.calls == [1]


def test_an_error_reaches_its_request_and_the_queue_lives_on() -> None:
    model = Model()

    async def work(queue: Queue) -> Any:
        with pytest.raises(RuntimeError, match="negative"):
            await queue.submit(rows(-1))
        return await queue.submit(rows(4))

    assert served(work, model)["y"].item() == 8


def test_closing_answers_what_waits() -> None:
    model = Model()

    async def run() -> list[Any]:
        queue = Queue(model, Limits(rows=1))
        waiting = [asyncio.create_task(queue.submit(rows(n))) for n in range(5)]
        await asyncio.sleep(0)
        await queue.close()
        return await asyncio.gather(*waiting)

    assert [answer["y"].item() for answer in asyncio.run(run())] == [0, 2, 4, 6, 8]


def test_many_requests_in_any_interleaving_get_their_own_answers() -> None:
    model = Model()

    async def work(queue: Queue) -> None:
        async def one(number: int) -> None:
            await asyncio.sleep((number * 7919 % 13) / 2000)
            answer = await queue.submit(rows(*[number] * (1 + number % 3)))
            assert answer["y"].ravel().tolist() == [2 * number] * (1 + number % 3)

        await asyncio.gather(*(one(number) for number in range(300)))

    began = time.monotonic()
    served(work, model, rows=8, window_s=0.001, waiting=400)
    assert time.monotonic() - began < 60
    assert sum(model.calls) == sum(1 + number % 3 for number in range(300))
    assert len(model.calls) < 300
