"""Which rung ships: decisions on figures, without a model."""

import pytest

from deploy.ladder import Candidate, allowed_drop, choose, drop_fails, verdict
from deploy.project import EvaluateTable
from deploy.validation.metrics import Drop


def candidate(name: str, median: float, spread: float = 0.1, size: int = 100, **why: str) -> Candidate:
    return Candidate(
        name=name, size_bytes=size, median_ms=median, interval=(median - spread, median + spread), **why
    )


def drop(value: float, low: float, high: float) -> Drop:
    return Drop(value=0.9 - value, reference=0.9, drop=value, interval=(low, high), samples=500)


def test_the_fastest_rung_that_passes_ships() -> None:
    choice = choose([candidate("a", 3), candidate("b", 2), candidate("c", 1, fails="accuracy")])
    assert choice is not None
    assert (choice.name, choice.runner_up) == ("b", "a")


def test_where_latency_intervals_overlap_the_smaller_rung_ships() -> None:
    choice = choose([candidate("fast", 1.0, size=200), candidate("small", 1.15, size=100)])
    assert choice is not None
    assert choice.name == "small"
    assert "fast" in choice.reason


def test_objective_size_ships_the_smallest() -> None:
    choice = choose([candidate("fast", 1, size=200), candidate("small", 9, size=100)], by_size=True)
    assert choice is not None
    assert choice.name == "small"


def test_a_missed_budget_alone_still_ships_the_closest() -> None:
    choice = choose(
        [candidate("a", 1, size=200, over_budget="size"), candidate("b", 2, size=150, over_budget="size")]
    )
    assert choice is not None
    assert (choice.name, choice.reason) == ("b", "closest to the budget")


def test_nothing_ships_when_every_rung_is_wrong() -> None:
    assert choose([candidate("a", 1, fails="outputs"), candidate("b", 2, fails="accuracy")]) is None


@pytest.mark.parametrize(
    ("interval", "expected"), [((0.0, 0.01), "met"), ((0.011, 0.02), "missed"), ((0.0, 0.02), "uncertain")]
)
def test_the_verdict_goes_by_the_interval(interval: tuple[float, float], expected: str) -> None:
    assert verdict(drop(0.01, *interval), 0.01) == expected


def test_an_estimate_is_accepted_by_its_point_and_a_proof_by_its_interval() -> None:
    uncertain = drop(0.005, -0.01, 0.02)
    assert drop_fails(uncertain, EvaluateTable(source="e.npz", max_drop=0.01)) is None
    reason = drop_fails(uncertain, EvaluateTable(source="e.npz", max_drop=0.01, accept="proven"))
    assert reason is not None
    assert "uncertain" in reason


def test_a_relative_drop_is_taken_of_the_reference() -> None:
    assert allowed_drop(EvaluateTable(source="e", max_drop_relative=0.02), 50.0) == pytest.approx(1.0)
