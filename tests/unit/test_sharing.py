"""Whether requests may share a call is measured: never where the batch decides a row's answer."""

from collections.abc import Callable

import numpy as np
import pytest

from calibration.dataset import Dataset
from calibration.spec import TensorSpec
from deploy.validation.sharing import measure_sharing

SPEC = TensorSpec(name="x", shape=("batch", 4), bounds={"batch": (1, 32)})
Arrays = dict[str, np.ndarray]
Answer = Callable[[np.ndarray], np.ndarray]


class Session:
    """Answers by a function, and takes as long as another says."""

    def __init__(
        self, answer: Callable[[np.ndarray], np.ndarray], nanoseconds: Callable[[int], float]
    ) -> None:
        self._answer, self._nanoseconds, self._rows = answer, nanoseconds, 1

    def run(self, inputs: Arrays) -> Arrays:
        return {"y": self._answer(inputs["x"])}

    def prepare(self, inputs: Arrays) -> None:
        self._rows = len(inputs["x"])

    def time(self, calls: int) -> list[int]:
        return [int(self._nanoseconds(self._rows))] * calls


def data(spec: TensorSpec = SPEC) -> Dataset:
    values = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    return Dataset(specs=(spec,), inputs={"x": values}, origin="test")


def shared_by_scale(x: np.ndarray) -> np.ndarray:
    """What dynamic quantization does: one scale for the whole batch."""
    scale = np.abs(x).max() / 127
    return (np.round(x / scale) * scale).sum(axis=1)


CHEAPER_TOGETHER = lambda rows: 1e5 + 1e4 * rows  # noqa: E731


@pytest.mark.parametrize(
    ("answer", "nanoseconds", "rows"),
    [
        (lambda x: x.sum(axis=1), CHEAPER_TOGETHER, 32),
        (lambda x: x.sum(axis=1), lambda rows: 1e5 * rows, 1),
        (shared_by_scale, CHEAPER_TOGETHER, 1),
        (lambda x: x.sum(axis=1) - x.mean(), CHEAPER_TOGETHER, 1),
        (lambda x: x.sum(axis=0), CHEAPER_TOGETHER, 1),
    ],
    ids=["pays", "pays nothing", "scale of the batch", "mean of the batch", "no row an answer"],
)
def test_rows_share_a_call_only_where_they_are_independent_and_it_pays(
    answer: Answer, nanoseconds: Callable[[int], float], rows: int
) -> None:
    sharing = measure_sharing(Session(answer, nanoseconds), data())  # type: ignore[arg-type]
    assert sharing.rows == rows


def test_the_smallest_batch_that_is_nearly_the_best_is_taken() -> None:
    sharing = measure_sharing(
        Session(lambda x: x.sum(axis=1), lambda rows: 1e5 * max(1, rows / 8)),  # type: ignore[arg-type]
        data(),
    )
    assert sharing.rows == 8


def test_a_fixed_batch_shares_nothing() -> None:
    spec = TensorSpec(name="x", shape=(2, 4))
    sharing = measure_sharing(Session(lambda x: x, CHEAPER_TOGETHER), data(spec))  # type: ignore[arg-type]
    assert (sharing.rows, sharing.independent) == (1, False)
