"""What a build may claim, in sentences: the headline and everything a reader must know before trusting it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deploy.manifest import Accuracy, BudgetLine, Latency, Report, Rung
from deploy.reporting import units
from deploy.reporting.evidence import (
    baseline,
    is_lossy,
    judge_latency,
    lossy_by,
    machine,
    measured,
    shipped,
    timed,
)

Severity = Literal["alarm", "caution", "note"]

CHOSEN_BY = {
    "device": "Chosen by device",
    "estimate": "Chosen by estimate",
    "host-proxy": "Chosen by host proxy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something to know before the figures; `command` is what would change it."""

    severity: Severity
    title: str
    text: str
    command: str | None = None


def chosen_by(report: Report) -> str:
    """The rank of evidence that chose, in words; it heads everything a person reads."""
    return CHOSEN_BY[report.manifest.chosen_by] if shipped(report.manifest) else "Nothing chosen"


def headline(report: Report) -> str:
    """What ships, its size, latency and accuracy, in one sentence."""
    rung = shipped(report.manifest)
    if rung is None:
        return "No rung ships."
    verb = "is kept, but did not pass" if rung.dropped else "ships"
    parts = [units.size(rung.size_bytes) if rung.size_bytes is not None else "size unmeasured"]
    parts.append(latency_claim(rung.latency))
    parts.append(accuracy_claim(rung.accuracy))
    return f"{rung.name} {verb}: {', '.join(parts)}."


def latency_claim(latency: Latency) -> str:
    """The median and where it comes from."""
    if latency.median_ms is None:
        return "latency unmeasured"
    return f"{units.milliseconds(latency.median_ms)} {timed(latency.measured_on)}"


def accuracy_claim(accuracy: Accuracy) -> str:
    """The metric, its drop with the interval, and the verdict."""
    if not measured(accuracy):
        return "accuracy unmeasured"
    text = f"{accuracy.metric} {units.score(accuracy.metric, accuracy.value)}"
    if accuracy.drop is None:
        return text
    text += f", drop {units.drop(accuracy.metric, accuracy.drop)}"
    if accuracy.drop_ci95:
        text += f" {units.drop_between(accuracy.metric, accuracy.drop_ci95)}"
    return f"{text} ({accuracy.verdict})"


def notices(report: Report, *, build: str = "BUILD") -> list[Notice]:
    """Everything that limits the headline, gravest first; `build` is the folder's name in commands."""
    found = [
        *_shipping(report),
        *_judging(report),
        *_choosing(report, build),
        *_throughput(report),
        *_budgets(report),
    ]
    found += [*_surroundings(report), *_reused(report)]
    order: dict[Severity, int] = {"alarm": 0, "caution": 1, "note": 2}
    return sorted(found, key=lambda notice: order[notice.severity])


def _shipping(report: Report) -> Iterator[Notice]:
    rung = shipped(report.manifest)
    if rung is None:
        yield Notice(severity="alarm", title="No rung passed", text=_all_dropped(report))
    elif rung.dropped:
        text = f"{rung.name} is the best there is and is kept, marked: {rung.dropped}"
        yield Notice(severity="alarm", title="No rung passed", text=text)
    if rung and rung.parity and not rung.parity.input_sensitive:
        text = f"{rung.name} answered the same whatever it was fed."
        yield Notice(severity="alarm", title="Outputs do not move with inputs", text=text)


def _all_dropped(report: Report) -> str:
    return "; ".join(f"{rung.name}: {rung.dropped}" for rung in report.manifest.rungs if rung.dropped)


def _judging(report: Report) -> Iterator[Notice]:
    rung = shipped(report.manifest)
    if rung is None:
        return
    why = f": {rung.accuracy.reason}" if rung.accuracy.reason else ""
    if not measured(rung.accuracy) and is_lossy(rung):
        text = f"{rung.name} is {lossy_by(rung)}; what that costs in accuracy was not measured{why}"
        yield Notice(severity="alarm", title="Lossy, and accuracy unmeasured", text=text)
    elif not measured(rung.accuracy):
        text = f"{rung.name} is the dense float model, exported{why}"
        yield Notice(severity="note", title="Accuracy unmeasured", text=text)
    elif rung.accuracy.verdict == "missed":
        yield Notice(severity="alarm", title="Accuracy missed", text=_interval_text(rung.accuracy) + why)
    elif rung.accuracy.verdict == "uncertain":
        yield Notice(severity="caution", title="Accuracy uncertain", text=_interval_text(rung.accuracy) + why)


def _interval_text(accuracy: Accuracy) -> str:
    if accuracy.drop is None:
        return f"{accuracy_claim(accuracy)} on {accuracy.samples} samples"
    interval = f" {units.drop_between(accuracy.metric, accuracy.drop_ci95)}" if accuracy.drop_ci95 else ""
    return f"Drop {units.drop(accuracy.metric, accuracy.drop)}{interval} on {accuracy.samples} samples"


def _choosing(report: Report, build: str) -> Iterator[Notice]:
    manifest = report.manifest
    rung = shipped(manifest)
    if rung is None:
        return
    title = chosen_by(report)
    runner_up = f" The runner-up is {report.runner_up}." if report.runner_up else ""
    where = machine(rung.latency.measured_on) if rung.latency.median_ms is not None else ""
    if manifest.chosen_by == "host-proxy":
        text = _proxy(where, manifest.target) + runner_up
        yield Notice(severity="caution", title=title, text=text, command=_measure(report, build))
    elif manifest.chosen_by == "estimate":
        text = f"Latencies are a cost model's, from the profile of {manifest.target}.{runner_up}"
        yield Notice(severity="caution", title=title, text=text, command=_measure(report, build))
    else:
        told = (
            f"Latencies were measured on the target itself, {where}." if where else "No latency was measured."
        )
        text = told + runner_up
        yield Notice(severity="note", title=title, text=text)


def _throughput(report: Report) -> Iterator[Notice]:
    rung = shipped(report.manifest)
    if rung is None or rung.throughput is None:
        return
    best = rung.throughput
    low, high = best.ci95
    rate = f"{best.samples_per_s:,.0f} samples a second [{low:,.0f}, {high:,.0f}]"
    threads = "1 thread" if best.threads == 1 else f"{best.threads} threads"
    text = f"{rate} with a batch of {best.batch} and {threads}: the objective that chose"
    yield Notice(severity="note", title="Throughput", text=text)


def _proxy(where: str, target: str) -> str:
    if not where:
        return f"The shipped rung was timed neither on {target} nor on this machine."
    told = f"Latencies are of {where}, not of {target}."
    return f"{told} They rank the rungs there and settle no latency budget."


def _measure(report: Report, build: str) -> str | None:
    """The command that measures on the target, unless a budget line already names it."""
    named = any(line.how and "--device" in line.how for line in report.manifest.budget)
    return None if named else f"deploy validate {build} --device DEVICE"


def _budgets(report: Report) -> Iterator[Notice]:
    rung = shipped(report.manifest)
    metric = rung.accuracy.metric if rung else None
    for line in report.manifest.budget:
        told = line.name == "max_drop" and rung is not None and line.verdict == rung.accuracy.verdict
        if line.verdict != "met" and not told:
            yield _budget(line, metric)


def _budget(line: BudgetLine, metric: str | None) -> Notice:
    bound = f"{line.name} {units.limit(line.name, line.limit, metric)}"
    if line.verdict == "unmeasured":
        text = f"No measurement settles {bound}"
    else:
        text = f"{bound} was asked, {units.limit(line.name, line.value, metric)} found"
    severity: Severity = "alarm" if line.verdict == "missed" else "caution"
    return Notice(severity=severity, title=f"Budget {line.verdict}", text=text, command=line.how)


def _surroundings(report: Report) -> Iterator[Notice]:
    manifest = report.manifest
    if manifest.fallback:
        yield Notice(severity="caution", title="Fallback", text=manifest.fallback)
    for warning in manifest.warnings:
        yield Notice(severity="caution", title="Warning", text=warning)


def _reused(report: Report) -> Iterator[Notice]:
    rung = shipped(report.manifest)
    if report.report_accuracy is not None:
        yield _untouched(report.report_accuracy)
    elif rung and measured(rung.accuracy):
        used = "choose among the rungs" if len(report.manifest.rungs) > 1 else "accept the rung"
        text = f"No [report] data was given: the accuracy shown was also used to {used}"
        yield Notice(severity="note", title="Accuracy seen before", text=text)


def _untouched(accuracy: Accuracy) -> Notice:
    if not measured(accuracy):
        text = f"The [report] data gave no figure: {accuracy.reason or 'no reason recorded'}"
        return Notice(severity="caution", title="Untouched data", text=text)
    claim = f"{accuracy_claim(accuracy)}, {accuracy.samples} samples"
    text = f"On [report] data, touched once by the shipped rung: {claim}"
    severity: Severity = "alarm" if accuracy.verdict == "missed" else "note"
    return Notice(severity=severity, title="Untouched data", text=text)


def size_against_dense(report: Report) -> str:
    """The shipped size against the dense float rung's, empty where there is nothing to compare."""
    rung, dense = shipped(report.manifest), baseline(report.manifest)
    if rung is None or dense is None or rung is dense or not rung.size_bytes or not dense.size_bytes:
        return ""
    ratio = dense.size_bytes / rung.size_bytes
    word = "smaller" if ratio >= 1 else "larger"
    return f"{units.number(ratio if ratio >= 1 else 1 / ratio, 2)}× {word} than {dense.name}"


def speed_against_dense(report: Report) -> str:
    """The shipped latency against the dense float rung's, only as far as the intervals allow."""
    rung, dense = shipped(report.manifest), baseline(report.manifest)
    if rung is None or dense is None or rung is dense:
        return ""
    judgement = judge_latency(dense.latency, rung.latency)
    if judgement.verdict in ("faster", "slower") and judgement.ratio:
        ratio = judgement.ratio if judgement.verdict == "faster" else 1 / judgement.ratio
        return f"{units.number(ratio, 3)}× {judgement.verdict} than {dense.name}"
    if judgement.verdict in ("same", "unresolved"):
        return f"not distinguishable from {dense.name}: {judgement.why}"
    return "" if judgement.verdict == "unmeasured" else f"not compared with {dense.name}: {judgement.why}"


def outcome(report: Report, rung: Rung) -> Literal["shipped", "dropped", "runner-up", "not chosen"]:
    """What became of a rung, in a word."""
    if rung.name == report.manifest.shipped_rung:
        return "shipped"
    if rung.dropped:
        return "dropped"
    return "runner-up" if rung.name == report.runner_up else "not chosen"
