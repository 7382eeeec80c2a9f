"""What changed between two builds, and how much of it the measurements support."""

from collections.abc import Iterable, Iterator
from textwrap import wrap
from typing import Literal

from deploy.manifest import Accuracy, Latency, Machine, Manifest, Rung, Value
from deploy.reporting import units
from deploy.reporting.evidence import LatencyVerdict, judge_latency, measured, shipped
from deploy.reporting.markup import clean

SizeVerdict = Literal["same", "smaller", "larger", "unmeasured"]
AccuracyVerdict = Literal["same", "better", "worse", "unresolved", "not comparable", "unmeasured"]

_COLUMNS = 80


class Side(Value, frozen=True, kw_only=True):
    """One of the two builds and the figures of the rung that it ships."""

    model: str
    target: str
    created_at: str
    shipped_rung: str
    size_bytes: int | None
    metric: str | None
    accuracy: float | None
    drop: float | None
    drop_ci95: list[float] | None
    median_ms: float | None
    ci95_ms: list[float] | None
    measured_on: Machine | None


class SizeChange(Value, frozen=True, kw_only=True):
    """Sizes are counted, not sampled: any difference is real. `ratio` is b / a."""

    verdict: SizeVerdict
    ratio: float | None


class LatencyChange(Value, frozen=True, kw_only=True):
    """How b's latency stands to a's; `ratio` is a / b, above 1 where b is faster, null across machines."""

    verdict: LatencyVerdict
    ratio: float | None
    why: str


class AccuracyChange(Value, frozen=True, kw_only=True):
    """How b's accuracy stands to a's, by the intervals of their drops against the dense float model."""

    verdict: AccuracyVerdict
    why: str


class Difference(Value, frozen=True, kw_only=True):
    """A fact that differs; null on the side that lacks it."""

    name: str
    a: str | None
    b: str | None


class RungChange(Value, frozen=True, kw_only=True):
    """A rung that both builds hold and that came out differently."""

    name: str
    size: SizeChange
    latency: LatencyChange
    accuracy: AccuracyChange
    dropped: Difference | None


class Comparison(Value, frozen=True, kw_only=True):
    """Build `b` against build `a`."""

    a: Side
    b: Side
    size: SizeChange
    latency: LatencyChange
    accuracy: AccuracyChange
    notes: list[str]
    facts: list[Difference]
    versions: list[Difference]
    provenance: list[Difference]
    budget: list[Difference]
    rungs_added: list[str]
    rungs_removed: list[str]
    rungs_changed: list[RungChange]


def compare(a: Manifest, b: Manifest) -> Comparison:
    """What changed from build `a` to build `b`."""
    first, second = shipped(a), shipped(b)
    before, after = {rung.name: rung for rung in a.rungs}, {rung.name: rung for rung in b.rungs}
    same_model = a.provenance.model_sha256 == b.provenance.model_sha256
    return Comparison(
        a=_side(a, first),
        b=_side(b, second),
        size=_size(first, second),
        latency=_latency(first, second),
        accuracy=_accuracy(first, second, same_model),
        notes=list(_notes(a, b, first, second)),
        facts=_differences(_facts(a), _facts(b)),
        versions=_differences(_versions(a), _versions(b)),
        provenance=_differences(_provenance(a), _provenance(b)),
        budget=_differences(_budget(a), _budget(b)),
        rungs_added=[name for name in after if name not in before],
        rungs_removed=[name for name in before if name not in after],
        rungs_changed=list(_changed(before, after, same_model)),
    )


def _side(manifest: Manifest, rung: Rung | None) -> Side:
    accuracy = rung.accuracy if rung else None
    latency = rung.latency if rung else None
    return Side(
        model=manifest.model,
        target=manifest.target,
        created_at=manifest.created_at,
        shipped_rung=manifest.shipped_rung,
        size_bytes=rung.size_bytes if rung else None,
        metric=accuracy.metric if accuracy else None,
        accuracy=accuracy.value if accuracy else None,
        drop=accuracy.drop if accuracy else None,
        drop_ci95=accuracy.drop_ci95 if accuracy else None,
        median_ms=latency.median_ms if latency else None,
        ci95_ms=latency.ci95_ms if latency else None,
        measured_on=latency.measured_on if latency else None,
    )


def _size(a: Rung | None, b: Rung | None) -> SizeChange:
    if a is None or b is None or a.size_bytes is None or b.size_bytes is None:
        return SizeChange(verdict="unmeasured", ratio=None)
    ratio = b.size_bytes / a.size_bytes if a.size_bytes else None
    if a.size_bytes == b.size_bytes:
        return SizeChange(verdict="same", ratio=ratio)
    return SizeChange(verdict="smaller" if b.size_bytes < a.size_bytes else "larger", ratio=ratio)


def _latency(a: Rung | None, b: Rung | None) -> LatencyChange:
    if a is None or b is None:
        return LatencyChange(verdict="unmeasured", ratio=None, why="a build ships no rung")
    judged = judge_latency(a.latency, b.latency)
    return LatencyChange(verdict=judged.verdict, ratio=judged.ratio, why=judged.why)


def _accuracy(a: Rung | None, b: Rung | None, same_model: bool) -> AccuracyChange:
    if a is None or b is None:
        return AccuracyChange(verdict="unmeasured", why="a build ships no rung")
    return judge_accuracy(a.accuracy, b.accuracy, same_model=same_model)


def judge_accuracy(a: Accuracy, b: Accuracy, *, same_model: bool) -> AccuracyChange:
    """Better or worse where the 95% intervals of the drops are apart and the drops have one reference."""
    for accuracy in (a, b):
        if not measured(accuracy):
            return AccuracyChange(verdict="unmeasured", why=accuracy.reason or "no accuracy")
    if a.metric != b.metric:
        return AccuracyChange(verdict="not comparable", why=f"different metrics: {a.metric}; {b.metric}")
    if not same_model:
        why = "the dense models differ, so the drops have different references"
        return AccuracyChange(verdict="not comparable", why=why)
    if a.samples != b.samples:
        why = f"judged on different samples: {a.samples}; {b.samples}"
        return AccuracyChange(verdict="not comparable", why=why)
    if (a.value, a.drop, a.drop_ci95) == (b.value, b.drop, b.drop_ci95):
        return AccuracyChange(verdict="same", why="equal figures")
    if not a.drop_ci95 or not b.drop_ci95:
        return AccuracyChange(verdict="unresolved", why="an interval is missing")
    if b.drop_ci95[1] < a.drop_ci95[0]:
        return AccuracyChange(verdict="better", why="the 95% intervals of the drops are apart")
    if b.drop_ci95[0] > a.drop_ci95[1]:
        return AccuracyChange(verdict="worse", why="the 95% intervals of the drops are apart")
    return AccuracyChange(verdict="unresolved", why="the 95% intervals of the drops overlap")


def _notes(a: Manifest, b: Manifest, first: Rung | None, second: Rung | None) -> Iterator[str]:
    if a.model != b.model:
        yield "These are builds of different models."
    if a.target != b.target:
        yield "These are builds for different targets."
    if a.chosen_by != b.chosen_by:
        yield f"The rungs were chosen on different evidence: {a.chosen_by}; {b.chosen_by}."
    elif a.chosen_by == "host-proxy":
        yield f"Latencies are of the build machine, not of {b.target}: chosen by host proxy."
    if first is None or second is None:
        return
    if _threads(first.latency) != _threads(second.latency):
        yield f"Latencies were taken with {first.latency.threads} and {second.latency.threads} threads."


def _threads(latency: Latency) -> int | None:
    return latency.threads if latency.median_ms is not None else None


def _facts(manifest: Manifest) -> dict[str, str | None]:
    return {
        "model": manifest.model,
        "target": manifest.target,
        "chip": manifest.chip,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "shipped rung": manifest.shipped_rung,
        "chosen by": manifest.chosen_by,
        "fallback": manifest.fallback,
        "threads": str(manifest.recommended.threads),
        "batch": str(manifest.recommended.batch),
        "warnings": "; ".join(manifest.warnings) or None,
    }


def _versions(manifest: Manifest) -> dict[str, str | None]:
    environment = manifest.environment
    machine = {"python": environment.python, "os": environment.os, "cpu": environment.cpu}
    return {**machine, **environment.packages}


def _provenance(manifest: Manifest) -> dict[str, str | None]:
    provenance = manifest.provenance
    return {
        "model": provenance.model_sha256,
        "calibration data": provenance.calibration_sha256,
        "configuration": provenance.config_sha256,
        "seed": str(provenance.seed),
    }


def _budget(manifest: Manifest) -> dict[str, str | None]:
    rung = shipped(manifest)
    metric = rung.accuracy.metric if rung else None
    return {
        line.name: f"{units.limit(line.name, line.limit, metric)} {line.verdict}" for line in manifest.budget
    }


def _differences(a: dict[str, str | None], b: dict[str, str | None]) -> list[Difference]:
    names = [*a, *(name for name in b if name not in a)]
    return [Difference(name=n, a=a.get(n), b=b.get(n)) for n in names if a.get(n) != b.get(n)]


def _changed(before: dict[str, Rung], after: dict[str, Rung], same_model: bool) -> Iterator[RungChange]:
    for name, a in before.items():
        b = after.get(name)
        if b is None:
            continue
        reasons = _differences({"dropped": a.dropped}, {"dropped": b.dropped})
        change = RungChange(
            name=name,
            size=_size(a, b),
            latency=_latency(a, b),
            accuracy=_accuracy(a, b, same_model),
            dropped=reasons[0] if reasons else None,
        )
        if _differs(change):
            yield change


def _differs(change: RungChange) -> bool:
    settled = change.latency.verdict in ("faster", "slower") or change.accuracy.verdict in ("better", "worse")
    return settled or change.size.verdict in ("smaller", "larger") or change.dropped is not None


def render(comparison: Comparison) -> str:
    """The comparison as plain text of at most 80 columns where names allow, with a final newline."""
    a, b = comparison.a, comparison.b
    lines = [f"a  {_title(a)}", f"b  {_title(b)}", ""]
    lines += _aligned(
        [
            (
                "rung",
                a.shipped_rung,
                b.shipped_rung,
                "same" if a.shipped_rung == b.shipped_rung else "changed",
            ),
            ("size", units.size(a.size_bytes), units.size(b.size_bytes), _size_words(comparison.size)),
            ("accuracy", _score(a), _score(b), comparison.accuracy.verdict),
            ("drop", _drop_words(a), _drop_words(b), ""),
            ("latency", _time(a), _time(b), _latency_words(comparison.latency)),
        ]
    )
    said = [f"accuracy {comparison.accuracy.verdict}: {comparison.accuracy.why}"]
    said += [f"latency {comparison.latency.verdict}: {comparison.latency.why}", *comparison.notes]
    lines += ["", *(line for text in said for line in wrap(text, _COLUMNS, subsequent_indent="  "))]
    lines += _rung_lines(comparison)
    for title, found in (
        ("changed", comparison.facts),
        ("budget", comparison.budget),
        ("versions", comparison.versions),
        ("provenance", comparison.provenance),
    ):
        lines += _block(title, found)
    return "\n".join(clean(line) for line in lines) + "\n"


def _title(side: Side) -> str:
    return f"{side.model} on {side.target}, {side.created_at}"


def _score(side: Side) -> str:
    return units.score(side.metric, side.accuracy)


def _drop_words(side: Side) -> str:
    if side.drop is None:
        return "-"
    interval = f" {units.drop_between(side.metric, side.drop_ci95)}" if side.drop_ci95 else ""
    return f"{units.drop(side.metric, side.drop, unit=False)}{interval}"


def _time(side: Side) -> str:
    interval = f" {units.between(side.ci95_ms)}" if side.ci95_ms and side.median_ms is not None else ""
    return f"{units.milliseconds(side.median_ms)}{interval}"


def _size_words(change: SizeChange) -> str:
    if change.ratio is None or change.verdict not in ("smaller", "larger"):
        return change.verdict
    if 0.9 < change.ratio < 1.1:
        return f"{units.number(100 * abs(change.ratio - 1), 2)}% {change.verdict}"
    return f"{units.number(max(change.ratio, 1 / change.ratio))}× {change.verdict}"


def _latency_words(change: LatencyChange) -> str:
    """The verdict, and by how much only where it claims a difference."""
    if change.ratio is None or change.verdict not in ("faster", "slower"):
        return change.verdict
    return f"{units.number(max(change.ratio, 1 / change.ratio))}× {change.verdict}"


def _rung_lines(comparison: Comparison) -> list[str]:
    lines = [f"  + {name}" for name in comparison.rungs_added]
    lines += [f"  - {name}" for name in comparison.rungs_removed]
    lines += [f"  ~ {change.name}: {_change_words(change)}" for change in comparison.rungs_changed]
    return ["", "rungs", *lines] if lines else []


def _change_words(change: RungChange) -> str:
    words = [_size_words(change.size)] if change.size.verdict in ("smaller", "larger") else []
    words += [_latency_words(change.latency)] if change.latency.verdict in ("faster", "slower") else []
    words += [f"accuracy {change.accuracy.verdict}"] if change.accuracy.verdict in ("better", "worse") else []
    if change.dropped:
        words.append(f"now dropped: {change.dropped.b}" if change.dropped.b else "no longer dropped")
    return ", ".join(words)


def _block(title: str, found: list[Difference]) -> list[str]:
    rows = [(one.name, _shown(one.a), "->", _shown(one.b)) for one in found]
    return ["", title, *(f"  {line}" for line in _aligned(rows))] if rows else []


def _shown(value: str | None) -> str:
    """A fact in a column: a digest by its first letters, as much as tells two apart."""
    if value is None:
        return "none"
    return value[:12] if len(value) == 64 and set(value) <= set("0123456789abcdef") else value


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    wide = [max(len(row[at]) for row in table) for at in range(len(table[0]))] if table else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in table
    ]
