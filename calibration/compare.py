"""How two sets of outputs compare, and how sure a difference is: pure functions on arrays."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import UsageError, WrongOutputsError

Array = NDArray[Any]
Floats = NDArray[np.float64]

SNR_CAP_DB = 200.0
_FEW_VALUES = 16
_CHUNK_DRAWS = 1 << 21
_MOST_DRAWS = 1 << 27


def snr_db(reference: Array, candidate: Array) -> float:
    """Signal-to-noise ratio in decibels: 10 log10(sum(reference^2) / sum((reference - candidate)^2)).

    Sums run in float64. Equal arrays give SNR_CAP_DB, which also bounds every other result. Equal
    infinities (masked logits) count as equal and add no signal; a NaN, or an infinity that only one
    side has, gives -inf. Raises WrongOutputsError when the shapes differ.
    """
    signal, noise = _finite_pair(reference, candidate)
    if noise is None:
        return -math.inf
    noise_peak = float(np.max(np.abs(noise), initial=0.0))
    if noise_peak == 0.0:
        return SNR_CAP_DB
    signal_peak = float(np.max(np.abs(signal), initial=0.0))
    if signal_peak == 0.0:
        return -math.inf
    # Dividing by the peaks first keeps the squares of very large or small values in range.
    signal_log = 2 * math.log10(signal_peak) + math.log10(float(np.sum((signal / signal_peak) ** 2)))
    noise_log = 2 * math.log10(noise_peak) + math.log10(float(np.sum((noise / noise_peak) ** 2)))
    return min(SNR_CAP_DB, 10 * (signal_log - noise_log))


def max_abs_error(reference: Array, candidate: Array) -> float:
    """The largest absolute difference; inf where a NaN or an infinity stands on one side only.

    Raises WrongOutputsError when the shapes differ.
    """
    _, noise = _finite_pair(reference, candidate)
    return math.inf if noise is None else float(np.max(np.abs(noise), initial=0.0))


def top1_agreement(reference: Array, candidate: Array) -> float | None:
    """The share of rows whose largest entry (last axis) stands at the same index.

    None where the question makes no sense: fewer than two axes, fewer than two classes, or no rows.
    A row with a NaN on either side does not agree. Raises WrongOutputsError when the shapes differ.
    """
    _check_shapes(reference, candidate)
    if reference.ndim < 2 or reference.shape[-1] < 2 or reference.size == 0:
        return None
    same = np.argmax(reference, axis=-1) == np.argmax(candidate, axis=-1)
    broken = _has_nan(reference) | _has_nan(candidate)
    return float(np.mean(same & ~broken))


def input_sensitive(outputs_by_sample: Array, *, least: float = 1e-3) -> bool:
    """Whether outputs (samples, ...) of different inputs differ by more than rounding.

    The root mean square of what varies between samples must exceed `least` times the root mean
    square of the outputs. A deep network with random weights returns almost only its biases: its
    outputs vary by parts in 10^5 or less, and comparing them proves nothing about the export.
    Entries that are infinite in any sample are left out; NaN anywhere gives False.
    Raises UsageError for fewer than two samples.
    """
    if outputs_by_sample.ndim == 0 or outputs_by_sample.shape[0] < 2:
        raise UsageError(
            "whether outputs move with inputs cannot be told",
            found=f"outputs of shape {outputs_by_sample.shape}",
            expected="at least two different samples",
            fix="give more samples",
        )
    values = _floats(outputs_by_sample).reshape(outputs_by_sample.shape[0], -1)
    if np.isnan(values).any():
        return False
    values = values[:, np.isfinite(values).all(axis=0)]
    peak = float(np.max(np.abs(values), initial=0.0))
    if peak == 0.0:
        return False
    values = values / peak
    varying = math.sqrt(float(np.mean((values - values.mean(axis=0)) ** 2)))
    return varying > least * math.sqrt(float(np.mean(values**2)))


def paired_interval(
    per_sample_reference: Array,
    per_sample_candidate: Array,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """The mean of reference - candidate over the samples, and its percentile bootstrap interval.

    Returns (mean, low, high). Samples are resampled in pairs (Efron and Tibshirani 1993, chapters 8
    and 13). Where the differences take few values (0/1 outcomes give -1, 0, 1), the counts of a
    resample are multinomial and are drawn at once. Otherwise resamples are drawn in pieces of bounded
    size; beyond 2^27 draws the normal interval, which the bootstrap then equals to well under a
    percent of its width, stands in.

    Differences that are all equal give an interval of width zero: the bootstrap knows only what it has
    seen. `unseen_bound` says what may have gone unseen. Raises UsageError for empty, unequal or
    non-finite data.
    """
    differences = _differences(per_sample_reference, per_sample_candidate)
    mean = float(differences.mean())
    values, counts = np.unique(differences, return_counts=True)
    if len(values) == 1:
        return mean, mean, mean
    tail = (1 - level) / 2
    if len(values) > _FEW_VALUES and len(differences) * resamples > _MOST_DRAWS:
        half = NormalDist().inv_cdf(1 - tail) * float(differences.std()) / math.sqrt(len(differences))
        return mean, mean - half, mean + half
    generator = np.random.default_rng(seed)
    if len(values) <= _FEW_VALUES:
        means = generator.multinomial(counts.sum(), counts / counts.sum(), resamples) @ values / counts.sum()
    else:
        means = _resampled_means(differences, resamples, generator)
    low, high = np.quantile(means, [tail, 1 - tail])
    return mean, float(low), float(high)


def samples_to_settle(
    per_sample_reference: Array, per_sample_candidate: Array, *, max_drop: float, level: float = 0.95
) -> int | None:
    """About how many samples would settle whether the mean of reference - candidate exceeds `max_drop`.

    Assumes that the mean and the spread of the differences stay as observed, so that the half-width
    z s / sqrt(n) falls to the distance between mean and limit. At least one more than there are; None
    where the mean lies on the limit and no number would do. Raises UsageError as `paired_interval`.
    """
    differences = _differences(per_sample_reference, per_sample_candidate)
    margin = abs(max_drop - float(differences.mean()))
    if margin == 0.0:
        return None
    half_width = NormalDist().inv_cdf((1 + level) / 2) * float(differences.std())
    return max(len(differences) + 1, math.ceil((half_width / margin) ** 2))


def unseen_bound(samples: int, *, level: float = 0.95) -> float:
    """The largest rate of an event that was seen in none of the samples, at this one-sided level.

    Exact (Clopper and Pearson 1934 for zero successes): 1 - (1 - level)^(1/n), about 3/n at 95%.
    Raises UsageError for fewer than one sample.
    """
    if samples < 1:
        raise UsageError("a rate needs samples", found=samples, expected="at least 1")
    return -math.expm1(math.log1p(-level) / samples)


def samples_unseen(rate: float, *, level: float = 0.95) -> int | None:
    """How many samples without the event bound its rate: the least n with unseen_bound(n) <= rate.

    None where no number would do.
    """
    if rate <= 0.0:
        return None
    return 1 if rate >= 1.0 else math.ceil(math.log1p(-level) / math.log1p(-rate))


def median_interval(samples: Array, level: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval of the median between two order statistics.

    The number of samples below the median is Binomial(n, 1/2), so [x(k), x(n-k+1)] covers it with at
    least `level` for the largest k with P(B < k) <= (1 - level) / 2 (David and Nagaraja 2003, 7.1).
    Too few samples for that (fewer than 6 at 95%) give their whole range. Raises UsageError for empty or
    NaN data.
    """
    ordered = np.sort(_floats(samples).ravel())
    if ordered.size == 0 or np.isnan(ordered[-1]):
        raise UsageError("a median needs numbers", found=f"{ordered.size} samples, or NaN among them")
    count = int(ordered.size)
    rank = max(1, _lower_rank(count, (1 - level) / 2))
    return float(ordered[rank - 1]), float(ordered[count - rank])


def _lower_rank(count: int, tail: float) -> int:
    """The largest k with P(Binomial(count, 1/2) < k) <= tail."""
    steps = np.arange(count, dtype=np.float64)
    log_mass = np.concatenate(([0.0], np.cumsum(np.log((count - steps) / (steps + 1))))) - count * math.log(2)
    below = np.cumsum(np.exp(log_mass))
    return int(np.searchsorted(below, tail, side="right"))


def _finite_pair(reference: Array, candidate: Array) -> tuple[Floats, Floats | None]:
    """Reference and error in float64 where finite; the error is None where they cannot be subtracted."""
    _check_shapes(reference, candidate)
    signal, other = _floats(reference).ravel(), _floats(candidate).ravel()
    finite = np.isfinite(signal) & np.isfinite(other)
    if not finite.all():
        if not np.array_equal(signal[~finite], other[~finite]):
            return signal, None
        signal, other = signal[finite], other[finite]
    return signal, signal - other


def _check_shapes(reference: Array, candidate: Array) -> None:
    if reference.shape != candidate.shape:
        raise WrongOutputsError(
            "outputs have another shape than the reference",
            found=candidate.shape,
            expected=str(reference.shape),
        )


def _floats(array: Array) -> Floats:
    return np.asarray(array).astype(np.float64)


def _has_nan(rows: Array) -> Array:
    """Which rows (last axis) hold a NaN."""
    return np.asarray(np.isnan(rows).any(axis=-1))


def _differences(reference: Array, candidate: Array) -> Floats:
    first, second = _floats(reference).ravel(), _floats(candidate).ravel()
    if first.shape != second.shape or first.size == 0:
        raise UsageError(
            "scores cannot be paired",
            found=f"{first.size} and {second.size} scores",
            expected="one score for each sample on both sides, at least one",
        )
    differences: Floats = first - second
    if not np.isfinite(differences).all():
        raise UsageError("a score is not a finite number", expected="finite scores for every sample")
    return differences


def _resampled_means(differences: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """The mean of each resample, drawn in pieces of at most about _CHUNK_DRAWS indices."""
    rows = max(1, _CHUNK_DRAWS // len(differences))
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        picked = generator.integers(len(differences), size=(stop - start, len(differences)), dtype=np.int32)
        means[start:stop] = differences[picked].mean(axis=1)
    return means
