"""Samples for a model: raw arrays by input name, preprocessed a batch at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration import preprocess
from calibration.preprocess import Preprocess
from calibration.spec import TensorSpec
from targets.errors import UsageError

Array = np.ndarray[Any, Any]
IDENTITY = Preprocess()
MOST_SYNTHETIC = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Samples along the first axis of every array; `origin` names them in errors.

    `synthetic` marks data that was made up: nothing measured on it is a quality.
    """

    origin: str
    inputs: Mapping[str, Array]
    specs: tuple[TensorSpec, ...]
    labels: Array | None = None
    preprocessing: Mapping[str, Preprocess] = field(default_factory=dict)
    synthetic: bool = False

    def __len__(self) -> int:
        return min(len(array) for array in self.inputs.values())

    def batch(self, start: int, stop: int) -> dict[str, Array]:
        """Samples start to stop as the model takes them."""
        return {spec.name: self._prepared(spec, start, stop) for spec in self.specs}

    def raw(self, start: int, stop: int) -> dict[str, Array]:
        """The same samples before preprocessing."""
        return {spec.name: self.inputs[spec.name][start:stop] for spec in self.specs}

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """All samples in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.batch(start, min(start + size, len(self)))

    def head(self, count: int | None) -> "Dataset":
        """The first samples."""
        return self if count is None or count >= len(self) else self.select(np.arange(count))

    def sample(self, count: int | None, seed: int) -> "Dataset":
        """A seeded choice of samples, in their own order."""
        if count is None or count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def select(self, index: Array) -> "Dataset":
        """The samples at these places."""
        return replace(
            self,
            inputs={name: array[index] for name, array in self.inputs.items()},
            labels=None if self.labels is None else self.labels[index],
        )

    def _prepared(self, spec: TensorSpec, start: int, stop: int) -> Array:
        array = self.inputs[spec.name][start:stop]
        settings = self.preprocessing.get(spec.name, IDENTITY)
        if settings != IDENTITY:
            array = preprocess.apply(settings, array)
        return np.ascontiguousarray(array, dtype=spec.dtype)


def check(data: Dataset) -> Dataset:
    """The dataset, when names, shapes, dtypes and values fit; UsageError for the first that does not."""
    for name, array in data.inputs.items():
        _check_axis(data, f"{name!r}", array)
    lengths = {name: len(array) for name, array in data.inputs.items()}
    if not lengths or min(lengths.values()) == 0:
        raise UsageError(f"{data.origin} holds no samples", expected="at least one", fix="add samples")
    if len(set(lengths.values())) > 1:
        raise UsageError(
            f"the arrays of {data.origin} differ in length",
            found=lengths,
            expected="one length",
            fix="save the same samples for every input",
        )
    for spec in data.specs:
        _check_input(data, spec)
    if data.labels is not None:
        _check_labels(data, data.labels, next(iter(lengths.values())))
    return data


def _check_axis(data: Dataset, what: str, array: Array) -> None:
    if not array.ndim:
        raise UsageError(
            f"{what} of {data.origin} is one number",
            found="an array without dimensions",
            expected="samples along the first dimension",
            fix="save it with its batch dimension",
        )


def _check_input(data: Dataset, spec: TensorSpec) -> None:
    raw = data.inputs[spec.name]
    if raw.dtype.kind not in "fiub":
        raise UsageError(
            f"{spec.name!r} of {data.origin} is not numeric",
            found=raw.dtype,
            expected=spec.dtype,
            fix="save it as numbers",
        )
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise UsageError(
            f"{spec.name!r} of {data.origin} holds NaN or infinity",
            found=f"{int((~np.isfinite(raw)).sum())} of {raw.size} numbers",
            expected="finite numbers",
            fix="remove or repair those samples",
        )
    preprocessed = spec.name in data.preprocessing and data.preprocessing[spec.name] != IDENTITY
    if not preprocessed and not _may_cast(raw.dtype, np.dtype(spec.dtype)):
        raise UsageError(
            f"{spec.name!r} of {data.origin} has the wrong dtype",
            found=raw.dtype,
            expected=f"{spec.dtype}, or one that fits into it",
            fix=f"save it as {spec.dtype}, or correct [inputs.{spec.name}] dtype",
        )
    if not preprocessed:
        _check_range(data, spec, raw)
    shape = data.batch(0, 1)[spec.name].shape
    wanted = spec.shape[1:]
    fits = len(shape) == len(wanted) + 1 and all(
        size == want if isinstance(want, int) else spec.bounds[want][0] <= size <= spec.bounds[want][1]
        for size, want in zip(shape[1:], wanted, strict=True)
    )
    if not fits:
        raise UsageError(
            f"{spec.name!r} of {data.origin} has the wrong shape",
            found=f"{tuple(shape[1:])} a sample{' after preprocessing' if preprocessed else ''}",
            expected=f"{tuple(wanted)}",
            fix=f"correct [inputs.{spec.name}] or the data",
        )


def _check_range(data: Dataset, spec: TensorSpec, raw: Array) -> None:
    """A wider dtype may hold what the input's cannot: casting would wrap it, or make it infinite."""
    target = np.dtype(spec.dtype)
    if np.can_cast(raw.dtype, target, casting="safe"):
        return
    limits = np.iinfo(target) if target.kind in "iu" else np.finfo(target)
    low, high = raw.min(), raw.max()
    if low < limits.min or high > limits.max:
        raise UsageError(
            f"{spec.name!r} of {data.origin} does not fit into {spec.dtype}",
            found=f"values from {low} to {high}",
            expected=f"{limits.min} to {limits.max}",
            fix=f"correct the data, or [inputs.{spec.name}] dtype",
        )


def _may_cast(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    same_kind = source.kind == target.kind or (source.kind in "iu" and target.kind in "iu")
    return np.can_cast(source, target, casting="safe") or same_kind


def _check_labels(data: Dataset, labels: Array, length: int) -> None:
    if labels.dtype.kind not in "fiub":
        raise UsageError(
            f"the labels of {data.origin} are not numeric",
            found=labels.dtype,
            expected="numbers, for classes their indices",
            fix="map names to indices before saving",
        )
    _check_axis(data, "'label'", labels)
    if len(labels) != length:
        raise UsageError(
            f"the labels of {data.origin} differ in length",
            found=len(labels),
            expected=f"{length}",
            fix="save one label a sample",
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise UsageError(
            f"the labels of {data.origin} hold NaN or infinity", expected="finite numbers", fix="repair them"
        )


def synthetic(specs: Sequence[TensorSpec], *, samples: int, seed: int) -> Dataset:
    """Made-up samples, fit for timing and never for quality: normal floats, zeros and ones for the rest."""
    entries = samples * sum(math.prod(spec.sizes()[1:]) for spec in specs)
    if entries > MOST_SYNTHETIC:
        raise UsageError(
            "synthetic data would be too large",
            found=f"{samples} samples, {entries} numbers",
            expected=f"at most {MOST_SYNTHETIC} numbers",
            fix="lower samples",
        )
    generator = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        shape = (samples, *spec.sizes()[1:])
        if np.dtype(spec.dtype).kind == "f":
            inputs[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        else:
            inputs[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return Dataset(origin="synthetic data", inputs=inputs, specs=tuple(specs), synthetic=True)
