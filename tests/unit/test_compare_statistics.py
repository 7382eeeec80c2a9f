"""Comparing outputs and judging differences, against closed forms and brute force."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from calibration.compare import (
    SNR_CAP_DB,
    input_sensitive,
    max_abs_error,
    median_interval,
    paired_interval,
    samples_to_settle,
    samples_unseen,
    snr_db,
    top1_agreement,
    unseen_bound,
)
from targets.errors import UsageError, WrongOutputsError


def test_a_tenth_of_the_signal_as_noise_is_twenty_decibels() -> None:
    signal = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    assert snr_db(signal, signal * np.float32(1.1)) == pytest.approx(20, abs=1e-4)


def test_equal_outputs_reach_the_cap_and_zero_error() -> None:
    signal = np.arange(6.0).reshape(2, 3)
    assert snr_db(signal, signal.copy()) == SNR_CAP_DB
    assert max_abs_error(signal, signal.copy()) == 0.0


def test_all_zero_reference_has_no_signal_unless_equal() -> None:
    assert snr_db(np.zeros(3), np.zeros(3)) == SNR_CAP_DB
    assert snr_db(np.zeros(3), np.ones(3)) == -math.inf


def test_nan_or_one_sided_infinity_is_the_worst_result() -> None:
    good = np.array([1.0, 2.0])
    for bad in (np.array([1.0, np.nan]), np.array([1.0, np.inf])):
        assert snr_db(good, bad) == -math.inf
        assert snr_db(bad, good) == -math.inf
        assert max_abs_error(good, bad) == math.inf
    both = np.array([1.0, np.nan])
    assert snr_db(both, both) == -math.inf


def test_masked_logits_count_as_equal() -> None:
    reference, candidate = np.array([-np.inf, 1.0, 2.0]), np.array([-np.inf, 1.0, 2.2])
    assert snr_db(reference, candidate) == pytest.approx(10 * math.log10(5 / 0.04))
    assert max_abs_error(reference, candidate) == pytest.approx(0.2)


def test_squares_of_huge_and_tiny_values_stay_in_range() -> None:
    for scale in (1e250, 1e-250):
        assert snr_db(np.array([scale, -scale]), np.array([scale, -1.1 * scale])) == pytest.approx(
            10 * math.log10(200)
        )


def test_another_shape_is_refused_instead_of_broadcast() -> None:
    for compare in (snr_db, max_abs_error, top1_agreement):
        with pytest.raises(WrongOutputsError, match="shape"):
            compare(np.ones((2, 3)), np.ones((1, 3)))


def test_top1_counts_rows_and_ignores_single_columns() -> None:
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    candidate = np.array([[0.2, 0.8], [0.1, 0.9], [np.nan, 0.6], [0.3, np.nan]])
    assert top1_agreement(reference, candidate) == 0.25
    assert top1_agreement(np.ones((4, 1)), np.ones((4, 1))) is None
    assert top1_agreement(np.ones(4), np.ones(4)) is None


def test_outputs_that_are_almost_only_bias_are_caught() -> None:
    generator = np.random.default_rng(0)
    bias = generator.normal(size=10)
    assert not input_sensitive(np.tile(bias, (8, 1)))
    assert not input_sensitive(bias + 1e-5 * generator.normal(size=(8, 10)))
    assert input_sensitive(bias + 1e-1 * generator.normal(size=(8, 10)))


def test_a_deep_random_network_is_not_input_sensitive_and_a_shallow_one_is() -> None:
    import torch

    torch.manual_seed(0)

    def network(depth: int) -> torch.nn.Sequential:
        layers = [m for _ in range(depth) for m in (torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU())]
        return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), *layers, torch.nn.AdaptiveAvgPool2d(1))

    images = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        assert not input_sensitive(network(20)(images).numpy())
        assert input_sensitive(network(1)(images).numpy())


def test_sensitivity_survives_integers_infinities_and_nan() -> None:
    assert input_sensitive(np.array([[1, 2], [3, 4]]))
    assert input_sensitive(np.array([[-np.inf, 2.0], [-np.inf, 4.0]]))
    assert not input_sensitive(np.array([[np.nan, 2.0], [1.0, 4.0]]))
    assert not input_sensitive(np.zeros((4, 2)))
    with pytest.raises(UsageError, match="two"):
        input_sensitive(np.ones((1, 2)))


def test_shortcut_for_few_values_agrees_with_scipys_paired_bootstrap() -> None:
    generator = np.random.default_rng(1)
    reference = (generator.random(500) < 0.9).astype(float)
    candidate = np.where(generator.random(500) < 0.08, 1 - reference, reference)
    mean, low, high = paired_interval(reference, candidate, seed=0, resamples=20000)
    expected = stats.bootstrap(
        (reference - candidate,), np.mean, n_resamples=20000, method="percentile", rng=generator
    ).confidence_interval
    assert mean == pytest.approx(np.mean(reference - candidate))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.0021)


def test_continuous_scores_agree_with_scipys_paired_bootstrap() -> None:
    generator = np.random.default_rng(2)
    reference = generator.normal(size=300)
    candidate = reference - 0.2 + 0.5 * generator.normal(size=300)
    _, low, high = paired_interval(reference, candidate, seed=0, resamples=20000)
    expected = stats.bootstrap(
        (reference - candidate,), np.mean, n_resamples=20000, method="percentile", rng=generator
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        differences = generator.choice([-1.0, 0.0, 1.0], size=400, p=[0.03, 0.92, 0.05])
        _, low, high = paired_interval(differences, np.zeros(400), seed=trial, resamples=1000)
        covered += low <= 0.02 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_million_scores_take_seconds_and_little_memory() -> None:
    generator = np.random.default_rng(4)
    reference = generator.normal(size=1_000_000)
    start = time.perf_counter()
    mean, low, high = paired_interval(reference, np.zeros(1_000_000), seed=0)
    assert time.perf_counter() - start < 5
    assert high - low == pytest.approx(2 * 1.96 / 1000, rel=0.01)
    assert low < mean < high


def test_same_seed_gives_the_same_interval_and_pairs_are_required() -> None:
    scores = np.random.default_rng(5).normal(size=100)
    assert paired_interval(scores, scores**2, seed=7) == paired_interval(scores, scores**2, seed=7)
    assert paired_interval(scores, scores, seed=7) == (0.0, 0.0, 0.0)
    for pair in ((scores, scores[:50]), (scores[:0], scores[:0]), (scores, scores * np.nan)):
        with pytest.raises(UsageError):
            paired_interval(*pair, seed=0)


def test_as_many_samples_as_it_says_do_settle_the_verdict() -> None:
    differences = np.repeat([-1.0, 0.0, 1.0], [8, 180, 12])
    assert paired_interval(differences, np.zeros(200), seed=0)[2] > 0.03
    needed = samples_to_settle(differences, np.zeros(200), max_drop=0.03)
    assert needed is not None
    assert needed > 3000
    settled = np.tile(differences, round(needed / 200))
    _, _, high = paired_interval(settled, np.zeros_like(settled), seed=0)
    assert high == pytest.approx(0.03, abs=0.001)
    assert samples_to_settle(np.array([0.0, 1.0]), np.zeros(2), max_drop=0.5) is None


def test_unseen_rate_is_the_exact_binomial_bound() -> None:
    for samples in (1, 20, 1000):
        exact = stats.binomtest(0, samples).proportion_ci(confidence_level=0.90, method="exact").high
        assert unseen_bound(samples) == pytest.approx(exact)


@pytest.mark.parametrize("rate", [0.5, 0.01, 0.001])
def test_the_least_number_of_samples_that_bounds_an_unseen_rate(rate: float) -> None:
    least = samples_unseen(rate)
    assert least is not None
    assert unseen_bound(least) <= rate < unseen_bound(least - 1)
    assert samples_unseen(0.0) is None
    assert samples_unseen(1.0) == 1


@pytest.mark.parametrize("count", [6, 7, 25, 200, 5000])
def test_median_interval_takes_the_binomial_order_statistics(count: int) -> None:
    rank = int(stats.binom.ppf(0.025, count, 0.5))
    if stats.binom.cdf(rank - 1, count, 0.5) > 0.025:
        rank -= 1
    shuffled = np.random.default_rng(0).permutation(np.arange(1, count + 1))
    assert median_interval(shuffled) == (rank, count - rank + 1)


def test_few_samples_give_their_whole_range_and_none_are_refused() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(UsageError):
            median_interval(bad)
