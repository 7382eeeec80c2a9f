"""What two measurements allow one to say, and which rungs are meant."""

import math
from dataclasses import dataclass
from typing import Literal

from deploy.manifest import Accuracy, Latency, Machine, Manifest, Rung

LatencyVerdict = Literal["same", "faster", "slower", "unresolved", "not comparable", "unmeasured"]

# Overlapping intervals alone do not prove equality: "same" needs both to lie within this share of the first.
SAME_WITHIN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyJudgement:
    """The second latency against the first; `ratio` is first / second, above 1 where the second is faster."""

    verdict: LatencyVerdict
    ratio: float | None
    why: str


def judge_latency(first: Latency, second: Latency) -> LatencyJudgement:
    """Faster or slower where the 95% intervals are apart, never across machines."""
    refusal = _refusal(first, second)
    if refusal:
        return refusal
    ratio = _median(first) / _median(second)
    if not first.ci95_ms or not second.ci95_ms:
        return LatencyJudgement(verdict="unresolved", ratio=ratio, why="an interval is missing")
    if second.ci95_ms[1] < first.ci95_ms[0]:
        return LatencyJudgement(verdict="faster", ratio=ratio, why="the 95% intervals are apart")
    if second.ci95_ms[0] > first.ci95_ms[1]:
        return LatencyJudgement(verdict="slower", ratio=ratio, why="the 95% intervals are apart")
    spread = max(abs(end / _median(first) - 1) for end in (*first.ci95_ms, *second.ci95_ms))
    if spread <= SAME_WITHIN:
        why = f"both 95% intervals lie within {SAME_WITHIN:.0%} of the first"
        return LatencyJudgement(verdict="same", ratio=ratio, why=why)
    return LatencyJudgement(verdict="unresolved", ratio=ratio, why="the 95% intervals overlap")


def _refusal(first: Latency, second: Latency) -> LatencyJudgement | None:
    for latency in (first, second):
        if not latency.median_ms or not math.isfinite(latency.median_ms):
            return LatencyJudgement(verdict="unmeasured", ratio=None, why=latency.reason or "no latency")
    if first.measured_on is None or second.measured_on is None:
        why = "the machine that was measured is not recorded"
        return LatencyJudgement(verdict="not comparable", ratio=None, why=why)
    if first.measured_on != second.measured_on:
        why = f"measured on different machines: {machine(first.measured_on)}; {machine(second.measured_on)}"
        return LatencyJudgement(verdict="not comparable", ratio=None, why=why)
    return None


def _median(latency: Latency) -> float:
    return latency.median_ms or math.nan


def machine(where: Machine | None) -> str:
    """A machine in words; its name is not repeated where it is the processor's."""
    if where is None:
        return "a machine that is not recorded"
    return where.name if where.cpu in ("", where.name) else f"{where.name} ({where.cpu})"


def timed(where: Machine | None) -> str:
    """`measured on` or `estimated for`, and the machine: an estimate is never called a measurement."""
    verb = "estimated for" if where is not None and where.kind == "estimate" else "measured on"
    return f"{verb} {machine(where)}"


def shipped(manifest: Manifest) -> Rung | None:
    """The rung that ships, or None where the manifest names none."""
    return next((rung for rung in manifest.rungs if rung.name == manifest.shipped_rung), None)


def baseline(manifest: Manifest) -> Rung | None:
    """The dense float rung, of the shipped rung's runtime where several runtimes compete."""
    dense = [rung for rung in manifest.rungs if is_dense(rung) and rung.precision == "float32"]
    prefix = runtime_of(manifest.shipped_rung)
    return next((rung for rung in dense if runtime_of(rung.name) == prefix), dense[0] if dense else None)


def runtime_of(name: str) -> str:
    """The runtime in a rung's name (`onnx/dense-int8`), empty where only one runtime competes."""
    return name.rpartition("/")[0]


def is_dense(rung: Rung) -> bool:
    """Nothing was removed."""
    return rung.pattern == "dense" and rung.sparsity == 0


def is_lossy(rung: Rung) -> bool:
    """Pruned or in fewer bits: its answers may differ from the dense float model's."""
    return not is_dense(rung) or rung.precision != "float32"


def lossy_by(rung: Rung) -> str:
    """What makes the rung lossy, in words."""
    pruned = "" if is_dense(rung) else f"{rung.sparsity:.0%} pruned ({rung.pattern})"
    return " and ".join(
        part for part in (pruned, rung.precision if rung.precision != "float32" else "") if part
    )


def measured(accuracy: Accuracy) -> bool:
    """A figure exists and someone judged it."""
    return accuracy.value is not None and accuracy.verdict != "unmeasured"


def direction(manifest: Manifest) -> Literal[1, -1]:
    """1 where more of the metric is better, -1 where less is, read from how drops follow values."""
    dense = baseline(manifest)
    reference = dense.accuracy.value if dense else None
    for rung in manifest.rungs:
        value, drop = rung.accuracy.value, rung.accuracy.drop
        if reference is None or value is None or not drop:
            continue
        return 1 if abs(reference - drop - value) <= abs(reference + drop - value) else -1
    return 1


def max_drop(manifest: Manifest) -> float | None:
    """The allowed drop where the budget states it."""
    return next((line.limit for line in manifest.budget if line.name == "max_drop"), None)
