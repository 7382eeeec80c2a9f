"""Throughput: the batch and threads with the most samples a second, by measurement."""

from collections.abc import Callable

import numpy as np
import pytest

from calibration.dataset import Dataset
from calibration.spec import TensorSpec
from deploy.validation import throughput
from deploy.validation.throughput import measure_rates

SPEC = TensorSpec(name="x", shape=("batch", 4), bounds={"batch": (1, 64)})


class Session:
    """Takes as long as a function of rows and threads says, in nanoseconds."""

    def __init__(self, nanoseconds: Callable[[int, int], float]) -> None:
        self._nanoseconds, self._rows, self.threads = nanoseconds, 1, 2

    def prepare(self, inputs: dict[str, np.ndarray]) -> None:
        self._rows = len(inputs["x"])

    def time(self, calls: int) -> list[int]:
        return [int(self._nanoseconds(self._rows, self.threads))] * calls

    def set_threads(self, threads: int) -> None:
        self.threads = threads


def data(spec: TensorSpec = SPEC) -> Dataset:
    return Dataset(origin="test", inputs={"x": np.ones((16, 4), np.float32)}, specs=(spec,))


@pytest.mark.parametrize(
    ("nanoseconds", "batch", "threads"),
    [
        (lambda rows, threads: 1e6 + 1e5 * rows / threads, 64, 2),
        (lambda rows, threads: 1e5 * rows * threads, 1, 1),
        (lambda rows, threads: 1e5 * max(rows, 8), 8, 1),
        (lambda rows, threads: 1e5 * rows * (1 + rows / 10) + 2e5, 4, 1),
    ],
    ids=["large and many", "small and one", "the smallest of equals", "in between"],
)
def test_the_best_batch_and_threads_are_found(
    nanoseconds: Callable[[int, int], float], batch: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput.os, "cpu_count", lambda: 2)
    session = Session(nanoseconds)
    rate = measure_rates({"a": session}, data(), threads=2)["a"]  # type: ignore[dict-item]
    assert (rate.batch, rate.threads) == (batch, threads)
    assert rate.samples_per_s == pytest.approx(1e9 * batch / nanoseconds(batch, threads), rel=0.01)
    assert rate.interval[0] <= rate.samples_per_s <= rate.interval[1]
    assert session.threads == 2


def test_a_fixed_batch_is_the_only_one() -> None:
    spec = TensorSpec(name="x", shape=(4, 4))
    session = Session(lambda rows, threads: 1e6)
    assert measure_rates({"a": session}, data(spec), threads=1)["a"].batch == 4  # type: ignore[dict-item]


def test_sizes_whose_calls_take_long_are_not_tried_further() -> None:
    asked: list[int] = []

    def slow(rows: int, threads: int) -> float:
        asked.append(rows)
        return 1e8 * rows

    measure_rates({"a": Session(slow)}, data(), threads=1)  # type: ignore[dict-item]
    assert max(asked) == 4
