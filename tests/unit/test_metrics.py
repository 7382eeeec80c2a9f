"""Metrics against scikit-learn and against their definitions; drops with intervals."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from deploy.validation.metrics import METRICS, check_labels, compare, compare_folds, find_metric
from targets.errors import UsageError

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 5, 200)
LOGITS = RNG.standard_normal((200, 5)) + 2 * np.eye(5)[LABELS]


def value(name: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    metric = METRICS[name]
    return float(metric.value(metric.rows(outputs, labels, outputs).mean(axis=0)))


def test_accuracy_is_the_share_of_right_answers() -> None:
    assert value("accuracy", LOGITS, LABELS) == pytest.approx((LOGITS.argmax(1) == LABELS).mean())


def test_top5_counts_labels_among_the_five_best() -> None:
    outputs = RNG.standard_normal((100, 12))
    labels = RNG.integers(0, 12, 100)
    wanted = np.mean([label in np.argsort(row)[-5:] for row, label in zip(outputs, labels, strict=True)])
    assert value("top5", outputs, labels) == pytest.approx(wanted)


def test_f1_is_scikit_learns_macro_f1() -> None:
    wanted = f1_score(LABELS, LOGITS.argmax(1), average="macro")
    assert value("f1", LOGITS, LABELS) == pytest.approx(wanted)


def test_mean_iou_is_scikit_learns_macro_jaccard_over_pixels() -> None:
    labels = RNG.integers(0, 3, (4, 6, 6))
    outputs = RNG.standard_normal((4, 3, 6, 6)) + 2 * np.moveaxis(np.eye(3)[labels], -1, 1)
    wanted = jaccard_score(labels.ravel(), outputs.argmax(1).ravel(), average="macro")
    assert value("mean-iou", outputs, labels) == pytest.approx(wanted)


def test_perplexity_is_the_exponent_of_the_mean_loss_and_skips_unjudged_labels() -> None:
    logits = RNG.standard_normal((3, 7, 11))
    labels = RNG.integers(0, 11, (3, 7))
    labels[0, :4] = -100
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    judged = labels >= 0
    losses = -np.take_along_axis(log_p, np.where(judged, labels, 0)[..., None], -1)[..., 0][judged]
    assert value("perplexity", logits, labels) == pytest.approx(np.exp(losses.mean()))


def test_embedding_cosine_is_one_for_the_reference_itself() -> None:
    metric = METRICS["embedding-cosine"]
    vectors = RNG.standard_normal((10, 8))
    np.testing.assert_allclose(metric.rows(vectors * 3, None, vectors), 1.0)


@pytest.mark.parametrize(("samples", "settled"), [(20, False), (200, False), (299, True), (1000, True)])
def test_no_difference_in_few_samples_does_not_prove_that_there_is_none(samples: int, settled: bool) -> None:
    logits, labels = np.tile(LOGITS, (5, 1))[:samples], np.tile(LABELS, 5)[:samples]
    drop = compare(METRICS["accuracy"], 2 * logits, labels, logits, direction="max", max_drop=0.01, seed=0)
    assert drop.drop == 0.0
    assert drop.interval is not None
    assert (drop.interval[1] <= 0.01) == settled
    assert drop.to_settle == (None if settled else 299)


@pytest.mark.parametrize("name", ["f1", "perplexity"])
def test_a_rung_equal_to_the_reference_has_no_drop_and_an_interval_of_zero(name: str) -> None:
    direction = METRICS[name].direction
    drop = compare(METRICS[name], LOGITS, LABELS, LOGITS, direction=direction, max_drop=0.01, seed=0)
    assert drop.drop == pytest.approx(0.0)
    assert drop.interval == pytest.approx((0.0, 0.0))


@pytest.mark.parametrize("name", ["accuracy", "f1", "perplexity"])
def test_a_worse_rung_has_a_positive_drop_inside_its_interval(name: str) -> None:
    noisy = LOGITS + 3 * np.random.default_rng(1).standard_normal(LOGITS.shape)
    metric = METRICS[name]
    drop = compare(metric, noisy, LABELS, LOGITS, direction=metric.direction, max_drop=0.01, seed=0)
    assert drop.interval is not None
    low, high = drop.interval
    assert 0 < low <= drop.drop <= high


def test_a_users_metric_gets_students_interval_over_folds() -> None:
    pairs = [(0.90, 0.92), (0.91, 0.92), (0.89, 0.92), (0.90, 0.92)]
    drop = compare_folds(pairs, (0.90, 0.92), direction="max", samples=100)
    differences = np.array([reference - candidate for candidate, reference in pairs])
    half = 3.182 * differences.std(ddof=1) / 2
    assert drop.interval == pytest.approx((0.02 - half, 0.02 + half))
    assert compare_folds(pairs[:2], (0.90, 0.92), direction="max", samples=20).interval is None


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="accuracy"):
        find_metric("acuracy")


@pytest.mark.parametrize(
    ("labels", "words"),
    [(None, "needs labels"), (np.array([0, 9]), "out of range"), (np.array([0.5, 1.0]), "class numbers")],
)
def test_labels_that_do_not_fit_are_told(labels: np.ndarray | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_labels("accuracy", METRICS["accuracy"], LOGITS[:2], labels, origin="e.npz")
