"""One rung judged: its artifact against its own module, and its accuracy against the dense model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calibration import compare
from calibration.dataset import Dataset
from calibration.spec import TensorSpec, usable_batch
from deploy import usercode
from deploy.builds import MIN_SNR_DB
from deploy.manifest import Parity
from deploy.project import EvaluateTable
from deploy.validation import metrics
from deploy.validation.metrics import CUSTOM, Drop
from deploy.validation.result import Validated
from exporters.capture import call_module, flatten_outputs, user_line
from exporters.remote import RemoteSession
from targets.errors import ModelError, UsageError, WrongOutputsError, first_line

Array = np.ndarray[Any, Any]
Predict = Callable[[Mapping[str, Array]], dict[str, Array]]

PARITY_SAMPLES = 32
GOLDEN_SAMPLES = 8
FOLDS = 10
LOWEST_SNR_DB = -999.0
MIN_FOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Everything validation needs besides the artifact."""

    parity_data: Dataset
    evaluation: Dataset | None
    evaluate: EvaluateTable | None
    folder: Path
    min_snr_db: Mapping[str, float]
    seed: int


def validate(
    session: RemoteSession,
    module: nn.Module,
    dense: Mapping[str, Array] | None,
    judge: Judge,
    *,
    outputs: Sequence[str],
    precision: str,
    golden_folder: Path,
) -> Validated:
    """Judges an opened artifact. `dense` holds the dense float model's outputs on the evaluation data.

    Writes the golden pair into `golden_folder`: inputs.npz, raw.npz where preprocessing is declared, and
    expected.npz.
    """
    least = judge.min_snr_db.get(precision, MIN_SNR_DB[precision])
    parity, warning = _parity(session, module, judge.parity_data, outputs, least)
    wrong = _what_is_wrong(parity, warning, precision)
    drop = None
    if judge.evaluation is not None and judge.evaluate is not None and dense is not None and wrong is None:
        drop = measure_drop(session.run, dense, judge.evaluation, judge, outputs)
    _write_golden(session, judge.parity_data, golden_folder)
    return Validated(
        parity=parity, drop=drop, peak_memory_bytes=session.peak_bytes(), wrong=wrong, warning=warning
    )


def module_predict(module: nn.Module, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> Predict:
    """The module as a function of arrays by name, in evaluation mode and without gradients."""

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        try:
            with torch.no_grad():
                leaves = flatten_outputs(call_module(module, specs, tensors))
        except (Exception, SystemExit) as error:  # it ran on its example: these very values do not fit
            line = user_line(error)
            raise UsageError(
                f"the model's forward raised on the project's data{f' at {line}' if line else ''}",
                found=first_line(error),
                expected="data that the model takes",
                fix="correct the data, or its [inputs] and preprocess",
            ) from error
        return {name: leaf.numpy() for name, leaf in zip(outputs, leaves, strict=True)}

    return predict


def predict_all(predict: Predict, data: Dataset, *, batch: int) -> dict[str, Array]:
    """The outputs for a whole dataset, by name. Raises ModelError for NaN."""
    parts = [predict(inputs) for inputs in data.batches(batch)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, array in joined.items():
        _refuse_nan(name, array, data.origin)
    return joined


def _refuse_nan(name: str, array: Array, origin: str) -> None:
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ModelError(
            f"output {name} is NaN on {origin}",
            found=f"{int(np.isnan(array).sum())} of {array.size} numbers",
            expected="finite outputs",
            fix="look for a division by zero or a logarithm of zero in the model",
        )


def measure_drop(
    predict: Predict, dense: Mapping[str, Array], data: Dataset, judge: Judge, outputs: Sequence[str]
) -> Drop:
    """The metric's drop against the dense float model on the same samples."""
    evaluate = judge.evaluate
    assert evaluate is not None
    if CUSTOM in evaluate.metric:
        return _custom_drop(predict, dense, data, judge)
    metric = metrics.find_metric(evaluate.metric)
    whole = _whole_batches(data)
    candidate = predict_all(predict, whole, batch=usable_batch(whole.specs))[outputs[0]]
    reference = dense[outputs[0]][: len(candidate)]
    metrics.check_labels(evaluate.metric, metric, reference, whole.labels, origin=data.origin)
    return metrics.compare(
        metric,
        candidate,
        whole.labels,
        reference,
        direction=evaluate.direction if metric.direction == "max" else metric.direction,
        max_drop=evaluate.max_drop,
        seed=judge.seed,
    )


def _whole_batches(data: Dataset) -> Dataset:
    """The samples that fill fixed batches; all of them where the batch is dynamic."""
    batch = usable_batch(data.specs)
    if isinstance(data.specs[0].shape[0], int):
        return data.head(len(data) // batch * batch)
    return data


def _parity(
    session: RemoteSession, module: nn.Module, data: Dataset, outputs: Sequence[str], least: float
) -> tuple[Parity, str | None]:
    specs = data.specs
    sizes = _batch_sizes(specs[0])
    data = data.head(max(PARITY_SAMPLES, sizes[-1]))
    reference_of = module_predict(module, specs, outputs)
    references: list[dict[str, Array]] = []
    candidates: list[dict[str, Array]] = []
    done = 0
    for size in sizes:
        for start in range(0, max(1, min(len(data), PARITY_SAMPLES) // size) * size, size):
            inputs = _filled(data, start, size)
            references.append(reference_of(inputs))
            candidates.append(session.run(inputs))
            done += size
    joined = [
        (np.concatenate([r[n] for r in references]), np.concatenate([c[n] for c in candidates]))
        for n in outputs
    ]
    for name, (reference, _) in zip(outputs, joined, strict=True):
        _refuse_nan(name, reference, data.origin)
    main = next((pair for pair in joined if pair[0].dtype.kind == "f"), joined[0])
    moves = [compare.input_sensitive(each.astype(np.float64)) for each in main] if done > 1 else [True, True]
    warning = None
    if not moves[0]:
        warning = "the model's own outputs hardly move with its inputs: agreement on them proves little"
    parity = Parity(
        reference="float module of this rung",
        samples=done,
        snr_db=max(LOWEST_SNR_DB, round(min(compare.snr_db(r, c) for r, c in joined), 2)),
        max_abs_error=max(compare.max_abs_error(r, c) for r, c in joined),
        top1_agreement=compare.top1_agreement(*main),
        input_sensitive=moves[1],
        batches=sizes,
        min_snr_db=least,
    )
    return parity, warning


def _batch_sizes(spec: TensorSpec) -> list[int]:
    """The batches to compare at: smallest, two, and largest where the batch is dynamic."""
    if not spec.shape or isinstance(spec.shape[0], int):
        return [spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1]
    low, high = spec.bounds[spec.shape[0]]
    return sorted({low, min(max(low, 2), high), high})


def _filled(data: Dataset, start: int, size: int) -> dict[str, Array]:
    """A batch of exactly this size; samples repeat where there are too few."""
    index = (start + np.arange(size)) % len(data)
    return data.select(index).batch(0, size)


def _what_is_wrong(parity: Parity, warning: str | None, precision: str) -> str | None:
    if parity.min_snr_db is not None and not parity.snr_db >= parity.min_snr_db:
        asked = f"{parity.min_snr_db:g} dB asked in {precision}"
        return f"outputs differ from the module's: {parity.snr_db:.1f} dB SNR, {asked}"
    if not parity.input_sensitive and warning is None:
        return "outputs do not move with the inputs, while the module's do"
    return None


def _write_golden(session: RemoteSession, data: Dataset, folder: Path) -> None:
    size = usable_batch(data.specs, GOLDEN_SAMPLES)
    index = np.arange(size) % len(data)
    golden = data.select(index)
    inputs = golden.batch(0, size)
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    np.savez(folder / "expected.npz", **session.run(inputs))  # type: ignore[arg-type]
    if data.preprocessing:
        np.savez(folder / "raw.npz", **golden.raw(0, size))  # type: ignore[arg-type]


def _custom_drop(predict: Predict, dense: Mapping[str, Array], data: Dataset, judge: Judge) -> Drop:
    """A user's metric, called with (predict, data) on all samples and on disjoint folds for the interval."""
    evaluate = judge.evaluate
    assert evaluate is not None
    count = len(data)
    folds = min(FOLDS, count // MIN_FOLD)
    parts = [data.select(part) for part in np.array_split(np.arange(count), folds)] if folds >= 3 else []
    offsets = np.cumsum([0] + [len(part) for part in parts])

    def both(part: Dataset, start: int) -> tuple[float, float]:
        known = {name: array[start : start + len(part)] for name, array in dense.items()}
        return _call_metric(predict, part, judge), _call_metric(_replay(known, part), part, judge)

    whole = both(data, 0)
    pairs = [both(part, int(offset)) for part, offset in zip(parts, offsets, strict=False)]
    return metrics.compare_folds(pairs, whole, direction=evaluate.direction, samples=count)


def _replay(known: Mapping[str, Array], data: Dataset) -> Predict:
    """The dense model's recorded outputs as a predict function: batches are asked for in order."""
    position = 0

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal position
        size = len(next(iter(inputs.values())))
        start = 0 if position + size > len(data) else position
        position = start + size
        return {name: array[start : start + size] for name, array in known.items()}

    return predict


def _call_metric(predict: Predict, data: Dataset, judge: Judge) -> float:
    evaluate = judge.evaluate
    assert evaluate is not None
    function = usercode.load_attribute(evaluate.metric, judge.folder, error=UsageError)
    arrays = data.batch(0, len(data))
    if data.labels is not None:
        arrays["label"] = data.labels
    size = usable_batch(data.specs)

    def in_batches(inputs: Mapping[str, Array]) -> dict[str, Array]:
        length = len(next(iter(inputs.values())))
        parts = [
            predict({n: a[i : i + size] for n, a in inputs.items() if n != "label"})
            for i in range(0, length, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    value = usercode.call(
        function, in_batches, arrays, reference=evaluate.metric, folder=judge.folder, error=UsageError
    )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{evaluate.metric} gives no number",
            found=repr(value),
            expected="a float",
            fix="return one number",
        ) from error
    if not np.isfinite(number):
        raise UsageError(
            f"{evaluate.metric} gives {number}",
            expected="a finite number",
            fix="look for an empty mean in it",
        )
    return number


def require_right(validated: Validated, rung: str) -> None:
    """Raises WrongOutputsError when a float32 rung's outputs are not the module's."""
    if validated.wrong:
        raise WrongOutputsError(
            f"{rung}: {validated.wrong}", expected="the export to compute what the module does"
        )
