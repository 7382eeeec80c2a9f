"""Which rung ships: pure decisions over measured rungs."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.manifest import Accuracy, Verdict
from deploy.validation.metrics import Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the choice needs to know of a rung. `fails` says why it may not ship."""

    name: str
    size_bytes: int
    median_ms: float
    interval: tuple[float, float]
    fails: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rung that ships, why, and the next best one."""

    name: str
    reason: str
    runner_up: str | None


def choose(candidates: Sequence[Candidate], *, by_size: bool = False) -> Choice | None:
    """The fastest candidate that passes; where latency intervals overlap, the smaller one.

    With `by_size` (objective "size") the smallest that passes. None when no candidate passes.
    """
    passing = [candidate for candidate in candidates if candidate.fails is None]
    if not passing:
        return None
    if by_size:
        ordered = sorted(passing, key=lambda candidate: (candidate.size_bytes, candidate.median_ms))
        return Choice(name=ordered[0].name, reason="smallest rung that passes", runner_up=_second(ordered))
    fastest = min(passing, key=lambda candidate: candidate.median_ms)
    level = [candidate for candidate in passing if candidate.interval[0] <= fastest.interval[1]]
    best = min(level, key=lambda candidate: (candidate.size_bytes, candidate.median_ms))
    reason = "fastest rung that passes"
    if best is not fastest:
        reason = f"as fast as {fastest.name} within the intervals, and smaller"
    rest = sorted((c for c in passing if c is not best), key=lambda candidate: candidate.median_ms)
    return Choice(name=best.name, reason=reason, runner_up=rest[0].name if rest else None)


def _second(ordered: Sequence[Candidate]) -> str | None:
    return ordered[1].name if len(ordered) > 1 else None


def verdict(drop: Drop, max_drop: float) -> Verdict:
    """met: the interval's upper end is within max_drop; missed: its lower end is beyond; else uncertain."""
    low, high = drop.interval or (drop.drop, drop.drop)
    if high <= max_drop:
        return "met"
    return "missed" if low > max_drop else "uncertain"


def accuracy_fails(accuracy: Accuracy, max_drop: float, accept: str) -> str | None:
    """Why a rung may not ship for its accuracy; None when it may, or when nothing was measured."""
    if accuracy.drop is None:
        return None
    if accept == "proven" and accuracy.verdict != "met":
        return f"a drop within {max_drop:g} is not proven: the verdict is {accuracy.verdict}"
    if accuracy.drop > max_drop + 1e-12:
        return f"{accuracy.metric} drops by {accuracy.drop:.4g}, {max_drop:g} is allowed"
    return None
