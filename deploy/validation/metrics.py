"""How good a model is on labelled samples, and how sure one can be of a drop.

A built-in metric turns outputs into statistics of each sample, shape (samples, k), and the mean of
those into a value. Resampling the rows then gives the interval of any metric, ratios too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.compare import paired_interval, samples_to_settle, samples_unseen, unseen_bound
from targets.errors import UsageError, nearest

Array = np.ndarray[Any, Any]
RESAMPLES = 2000
CHUNK_ENTRIES = 8_000_000
CUSTOM = ".py:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """`rows(outputs, labels, reference outputs)` is (samples, k); `value` maps means (..., k) to values."""

    rows: Callable[[Array, Array | None, Array], Array]
    value: Callable[[Array], Array]
    needs_labels: bool = True
    direction: str = "max"
    hits: bool = False
    """Whether a sample scores 0 to 1, so that what was seen in none of them is bounded, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """How much worse a candidate is than the reference, with its 95% interval (None: not to be had)."""

    value: float
    reference: float
    drop: float
    interval: tuple[float, float] | None
    samples: int
    to_settle: int | None = None


def find_metric(name: str) -> Metric:
    """A built-in metric. Raises UsageError naming the nearest."""
    if name not in METRICS:
        close = nearest(name, list(METRICS), 1)[0]
        raise UsageError(
            "evaluate.metric is unknown",
            found=repr(name),
            expected=f'{", ".join(METRICS)}, or "metrics.py:mine"',
            fix=f"did you mean {close!r}?",
        )
    return METRICS[name]


def check_labels(name: str, metric: Metric, outputs: Array, labels: Array | None, *, origin: str) -> None:
    """Raises UsageError when the labels are absent, of another length, or out of the outputs' range."""
    if not metric.needs_labels:
        return
    if labels is None:
        raise UsageError(
            f"metric {name} needs labels",
            found=f"no array 'label' in {origin}",
            expected="one label a sample",
            fix="save them as the array 'label', or choose a metric that needs none",
        )
    if labels.dtype.kind not in "iub":
        raise UsageError(
            f"the labels of {origin} are no class numbers",
            found=labels.dtype,
            expected="integers",
            fix="save the index of each class",
        )
    if outputs.ndim < 2:
        raise UsageError(
            f"metric {name} needs one score a class",
            found=f"outputs of shape {outputs.shape}",
            expected="(samples, ..., classes)",
        )
    classes = outputs.shape[1] if name == "mean-iou" else outputs.shape[-1]
    lowest = 0 if name != "perplexity" else labels.min(initial=0)
    if labels.size and (labels.min() < lowest or labels.max() >= classes):
        raise UsageError(
            f"a label of {origin} is out of range",
            found=f"labels from {labels.min()} to {labels.max()}",
            expected=f"0 to {classes - 1}: the model has {classes} outputs",
            fix="correct the labels, or name the weights of a model with these classes",
        )


def compare(
    metric: Metric,
    candidate: Array,
    labels: Array | None,
    reference: Array,
    *,
    direction: str,
    max_drop: float | None,
    seed: int,
) -> Drop:
    """The drop of a candidate's outputs against the reference's on the same samples, shape (samples, ...).

    Where no sample's score differs, the bootstrap's interval would have no width however few they are:
    the bound of an event that was seen in none of them stands in, about 3/n.
    """
    ours, theirs = metric.rows(candidate, labels, reference), metric.rows(reference, labels, reference)
    value, base = (float(metric.value(rows.mean(axis=0))) for rows in (ours, theirs))
    if not (np.isfinite(value) and np.isfinite(base)):
        raise UsageError(
            "the metric is not a finite number",
            found=f"{value} (reference {base})",
            expected="a finite value",
        )
    sign = 1.0 if direction == "max" else -1.0
    settle = None
    if metric.hits and np.array_equal(ours, theirs):
        drop, high = 0.0, unseen_bound(len(ours))
        low = -high
        if max_drop is not None and low <= max_drop < high:
            settle = samples_unseen(max_drop)
    elif ours.shape[1] == 1 and metric.value is _first:
        drop, low, high = paired_interval(sign * theirs[:, 0], sign * ours[:, 0], seed=seed)
        if max_drop is not None and low <= max_drop < high:
            settle = samples_to_settle(sign * theirs[:, 0], sign * ours[:, 0], max_drop=max_drop)
    else:
        drop = sign * (base - value)
        low, high = _bootstrap(metric, sign, theirs, ours, seed)
    return Drop(
        value=value, reference=base, drop=drop, interval=(low, high), samples=len(ours), to_settle=settle
    )


def _bootstrap(metric: Metric, sign: float, theirs: Array, ours: Array, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over paired samples (Efron and Tibshirani 1993, chapter 13)."""
    generator = np.random.default_rng(seed)
    count, drops = len(ours), []
    step = max(1, CHUNK_ENTRIES // count)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        weights = generator.multinomial(count, np.full(count, 1.0 / count), size=size) / count
        drops.append(sign * (metric.value(weights @ theirs) - metric.value(weights @ ours)))
    low, high = np.nanpercentile(np.concatenate(drops), [2.5, 97.5])
    return float(low), float(high)


def compare_folds(
    values: list[tuple[float, float]], whole: tuple[float, float], *, direction: str, samples: int
) -> Drop:
    """The drop of a user's own metric: (candidate, reference) on all data, its interval from disjoint folds.

    The interval is Student's over the folds' paired differences; None with fewer than three folds.
    """
    sign = 1.0 if direction == "max" else -1.0
    drop = sign * (whole[1] - whole[0])
    interval = None
    if len(values) >= 3:
        differences = np.array([sign * (reference - candidate) for candidate, reference in values])
        spread = (
            STUDENT_95[min(len(values), len(STUDENT_95) + 2) - 3]
            * differences.std(ddof=1)
            / np.sqrt(len(values))
        )
        interval = (float(drop - spread), float(drop + spread))
    return Drop(value=whole[0], reference=whole[1], drop=drop, interval=interval, samples=samples)


STUDENT_95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t for 2 to 9 degrees of freedom."""


def _first(means: Array) -> Array:
    return means[..., 0]


def _accuracy(outputs: Array, labels: Array | None, reference: Array) -> Array:
    return _per_sample(outputs.argmax(axis=-1) == labels)


def _top5(outputs: Array, labels: Array | None, reference: Array) -> Array:
    assert labels is not None
    best = np.argpartition(outputs, -min(5, outputs.shape[-1]), axis=-1)[..., -5:]
    return _per_sample((best == labels[..., None]).any(axis=-1))


def _per_sample(hits: Array) -> Array:
    means: Array = hits.reshape(len(hits), -1).mean(axis=1, keepdims=True)
    return means


def _cosine(outputs: Array, labels: Array | None, reference: Array) -> Array:
    """Cosine of each sample's output with the reference's: 1 for the reference itself."""
    ours, theirs = (a.reshape(len(a), -1).astype(np.float64) for a in (outputs, reference))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines: Array = ((ours * theirs).sum(axis=1) / np.maximum(norms, 1e-30))[:, None]
    return cosines


def _log_likelihood(outputs: Array, labels: Array | None, reference: Array) -> Array:
    """Negative log-likelihood summed over each sample's labels, and their number; below 0 is not judged."""
    assert labels is not None
    scores = outputs.astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(axis=-1)) + top[..., 0]
    judged = labels >= 0
    index = np.where(judged, labels, 0)[..., None].astype(np.int64)
    losses = np.where(judged, log_sum - np.take_along_axis(scores, index, axis=-1)[..., 0], 0.0)
    sums = losses.reshape(len(scores), -1).sum(axis=1)
    return np.stack([sums, judged.reshape(len(scores), -1).sum(axis=1).astype(np.float64)], axis=1)


def _perplexity(means: Array) -> Array:
    return np.exp(means[..., 0] / means[..., 1])


def _counts(predicted: Array, labels: Array, classes: int) -> Array:
    """True positives, predictions and labels of each class in each sample: (samples, 3 classes)."""
    predicted, labels = predicted.reshape(len(predicted), -1), labels.reshape(len(labels), -1)
    each = np.arange(classes)
    is_predicted, is_label = predicted[..., None] == each, labels[..., None] == each
    parts = [(is_predicted & is_label).sum(axis=1), is_predicted.sum(axis=1), is_label.sum(axis=1)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def _classification_counts(outputs: Array, labels: Array | None, reference: Array) -> Array:
    assert labels is not None
    return _counts(outputs.argmax(axis=-1), labels, outputs.shape[-1])


def _segmentation_counts(outputs: Array, labels: Array | None, reference: Array) -> Array:
    assert labels is not None
    return _counts(outputs.argmax(axis=1), labels, outputs.shape[1])


def _macro_f1(means: Array) -> Array:
    hits, predicted, actual = np.split(means, 3, axis=-1)
    return _mean_over_present(2 * hits, predicted + actual)


def _mean_iou(means: Array) -> Array:
    hits, predicted, actual = np.split(means, 3, axis=-1)
    return _mean_over_present(hits, predicted + actual - hits)


def _mean_over_present(numerator: Array, denominator: Array) -> Array:
    """The mean over classes that occur at all."""
    present = denominator > 0
    ratio = np.where(present, numerator / np.where(present, denominator, 1), 0)
    mean: Array = ratio.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
    return mean


METRICS: dict[str, Metric] = {
    "accuracy": Metric(rows=_accuracy, value=_first, hits=True),
    "top5": Metric(rows=_top5, value=_first, hits=True),
    "f1": Metric(rows=_classification_counts, value=_macro_f1),
    "mean-iou": Metric(rows=_segmentation_counts, value=_mean_iou),
    "perplexity": Metric(rows=_log_likelihood, value=_perplexity, direction="min"),
    "embedding-cosine": Metric(rows=_cosine, value=_first, needs_labels=False),
}
