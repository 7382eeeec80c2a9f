"""Which rung ships: pure decisions over measured rungs."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.manifest import Verdict
from deploy.project import EvaluateTable
from deploy.validation.metrics import Drop

DEFAULT_MAX_DROP = 0.01
TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the choice needs to know of a rung.

    `fails` says why it may not ship at all, `over_budget` which measured limit it breaks.
    """

    name: str
    size_bytes: int
    median_ms: float
    interval: tuple[float, float]
    fails: str | None = None
    over_budget: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rung that ships, why, and the next best one."""

    name: str
    reason: str
    runner_up: str | None


def choose(candidates: Sequence[Candidate], *, by_size: bool = False) -> Choice | None:
    """The fastest candidate that passes; where latency intervals overlap, the smaller one.

    With `by_size` (objective "size") the smallest that passes. Where only budgets stand in the way, the
    smallest is the choice; None when no candidate may ship at all.
    """
    sound = [candidate for candidate in candidates if candidate.fails is None]
    passing = [candidate for candidate in sound if candidate.over_budget is None]
    if not passing:
        closest = min(sound, key=lambda candidate: candidate.size_bytes, default=None)
        if closest is None:
            return None
        return Choice(name=closest.name, reason="closest to the budget", runner_up=None)
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


def allowed_drop(evaluate: EvaluateTable, reference: float) -> float:
    """The largest drop that [evaluate] allows, in the metric's unit; one hundredth where it says nothing."""
    if evaluate.max_drop is not None:
        return evaluate.max_drop
    if evaluate.max_drop_relative is not None:
        return evaluate.max_drop_relative * abs(reference)
    return DEFAULT_MAX_DROP


def verdict(drop: Drop, allowed: float) -> Verdict:
    """met: the interval's upper end is within; missed: its lower end is beyond; else uncertain."""
    low, high = drop.interval or (drop.drop, drop.drop)
    if high <= allowed:
        return "met"
    return "missed" if low > allowed else "uncertain"


def drop_fails(drop: Drop, evaluate: EvaluateTable) -> str | None:
    """Why a rung may not ship for its accuracy; None when it may."""
    allowed = allowed_drop(evaluate, drop.reference)
    settled = verdict(drop, allowed)
    if evaluate.accept == "proven" and settled != "met":
        return f"a drop within {allowed:g} is not proven: the verdict is {settled}"
    if drop.drop > allowed + TOLERANCE:
        return f"{evaluate.metric} drops by {drop.drop:.4g}, {allowed:g} is allowed"
    return None
