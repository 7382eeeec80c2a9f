"""report.html: one file that needs nothing else, the same for the same report."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from deploy.manifest import Accuracy, Latency, Manifest, Report, Rung
from deploy.reporting import charts, units
from deploy.reporting.claims import (
    Notice,
    chosen_by,
    headline,
    notices,
    outcome,
    size_against_dense,
    speed_against_dense,
)
from deploy.reporting.evidence import machine, measured, shipped, timed
from deploy.reporting.markup import Child, Markup, el, join

# Nothing may be loaded and nothing may run, whatever a model is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_RUNGS = "Rungs with 95% intervals. A drop is against the dense float model on the same samples."

Row = Sequence[Child]


def render_report(report: Report) -> str:
    """The report as one self-contained page; sections without data are left out."""
    manifest = report.manifest
    title = f"{manifest.model} on {manifest.target}"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title}: build report"),
        Markup(f"<style>{_style()}</style>"),
    )
    body = el("body", el("main", _top(report, title), _sections(report)), _foot(manifest))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


@cache
def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _top(report: Report, title: str) -> Markup:
    manifest = report.manifest
    facts = (manifest.chip, manifest.runtime, manifest.precision, manifest.created_at)
    return el(
        "header",
        el("p", chosen_by(report), class_=f"eyebrow {manifest.chosen_by}"),
        el("h1", title),
        el("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        el("p", headline(report), class_="lead"),
        el("ul", [_notice(notice) for notice in notices(report)], class_="notices"),
        _figures(report),
    )


def _notice(notice: Notice) -> Markup:
    command = el("code", notice.command, class_="command") if notice.command else None
    return el(
        "li",
        el("strong", notice.title),
        " ",
        el("span", _sentence(notice.text)),
        command,
        class_=notice.severity,
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _figures(report: Report) -> Markup | None:
    rung = shipped(report.manifest)
    if rung is None:
        return None
    return el(
        "dl",
        _figure("Size", units.size(rung.size_bytes), size_against_dense(report)),
        _figure(
            "Latency, median", units.milliseconds(rung.latency.median_ms), _latency_note(report, rung.latency)
        ),
        _figure(*_accuracy_figure(rung.accuracy)),
        _figure(*_parity_figure(rung)),
        class_="figures",
    )


def _figure(name: str, value: str, note: str) -> Markup:
    kind = "value none" if value == units.UNMEASURED else "value"
    return el("div", el("dt", name), el("dd", value, class_=kind), el("dd", note) if note else None)


def _latency_note(report: Report, latency: Latency) -> str:
    if latency.median_ms is None:
        return latency.reason or ""
    return "; ".join(part for part in (timed(latency.measured_on), speed_against_dense(report)) if part)


def _accuracy_figure(accuracy: Accuracy) -> tuple[str, str, str]:
    if not measured(accuracy):
        return "Accuracy", units.UNMEASURED, accuracy.reason or ""
    note = f"{_drop(accuracy)}, {accuracy.verdict}, {accuracy.samples} samples"
    return (accuracy.metric or "Accuracy").capitalize(), units.score(accuracy.metric, accuracy.value), note


def _drop(accuracy: Accuracy) -> str:
    if accuracy.drop is None:
        return "drop unmeasured"
    interval = f" {units.drop_between(accuracy.metric, accuracy.drop_ci95)}" if accuracy.drop_ci95 else ""
    return f"drop {units.drop(accuracy.metric, accuracy.drop)}{interval}"


def _parity_figure(rung: Rung) -> tuple[str, str, str]:
    if rung.parity is None:
        return "Parity", units.UNMEASURED, "outputs were not compared"
    note = f"against {rung.parity.reference}, {rung.parity.samples} samples"
    return "Parity", f"{units.number(rung.parity.snr_db)} dB", note


def _sections(report: Report) -> Iterable[Markup | None]:
    yield _rungs(report)
    yield _budget(report)
    yield _size(report)
    yield _pruning(report)
    yield _sensitivity(report)
    yield _recovery(report)
    yield _delegation(report)
    yield _plan(report)
    yield _interface(report.manifest)
    yield _stages(report)
    yield _origin(report.manifest)


def _section(title: str, *children: Child) -> Markup:
    return el("section", el("h2", title), *children)


def _rungs(report: Report) -> Markup | None:
    rungs = report.manifest.rungs
    if not rungs:
        return None
    numbers = {rung.name: index for index, rung in enumerate(rungs, 1)}
    shared = _shared(rungs)
    return _section(
        "The choice",
        _choice_picture(report, numbers),
        _table(
            _caption_of(rungs, shared),
            ("Rung", "Size", "Accuracy", "Drop", "Parity", "Latency", "Delegated", "Outcome"),
            [_rung_row(report, rung, numbers[rung.name], shared) for rung in rungs],
            numeric=(1, 2, 3, 4, 5, 6),
            marked=[outcome(report, rung).split("-")[0].replace(" ", "-") for rung in rungs],
        ),
    )


def _choice_picture(report: Report, numbers: dict[str, int]) -> Markup:
    traded = charts.trade(report, numbers)
    drawn = traded or charts.speeds(report, numbers)
    apart = len(report.manifest.rungs) - len(_drawn(report, traded is not None))
    if drawn is None:
        reason = next((rung.latency.reason for rung in report.manifest.rungs if rung.latency.reason), None)
        return el("p", f"No latency was measured: {reason or 'no reason recorded'}.", class_="empty")
    left_out = (
        f" {apart} of {len(numbers)} not drawn: unmeasured, or timed on another machine." if apart else ""
    )
    legend = el(
        "figcaption",
        [_key(kind, kind if kind in ("shipped", "dropped") else "passed") for kind in _kinds(report)],
        el("span", f"Whiskers are 95% intervals.{left_out}"),
        class_="legend",
    )
    return el("figure", drawn, legend)


def _kinds(report: Report) -> list[str]:
    """The marks that the picture uses; a runner-up is one that passed."""
    words = {outcome(report, rung) for rung in charts.one_machine(report)}
    passed = ["not-chosen"] if words & {"not chosen", "runner-up"} else []
    return [word for word in ("shipped",) if word in words] + passed + [w for w in ("dropped",) if w in words]


def _drawn(report: Report, with_accuracy: bool) -> list[Rung]:
    rungs = charts.one_machine(report)
    return [rung for rung in rungs if measured(rung.accuracy)] if with_accuracy else rungs


def _key(kind: str, text: str) -> Markup:
    ring = el("circle", cx=11, cy=11, r=9, class_="ring") if kind == "shipped" else None
    dot = el("circle", cx=11, cy=11, r=5, class_=f"dot {kind}")
    return el("span", el("svg", ring, dot, width=22, height=22, aria_hidden="true"), text, class_="key")


def _shared(rungs: Sequence[Rung]) -> tuple[str, ...]:
    """What is true of every rung, said once above the table instead of in each row."""
    kinds = ({_samples(rung.accuracy) for rung in rungs}, {_clock(rung.latency) for rung in rungs})
    return tuple(text for kind in kinds if len(kind) == 1 for text in kind if text)


def _caption_of(rungs: Sequence[Rung], shared: tuple[str, ...]) -> str:
    """The caption of the rungs: what the columns mean and what every row shares."""
    first = rungs[0]
    accuracy = "" if measured(first.accuracy) else "accuracy unmeasured: "
    latency = "latency unmeasured: " if first.latency.median_ms is None else "latency "
    told = [accuracy + text for text in (_samples(first.accuracy),) if text in shared]
    told += [latency + text for text in (_clock(first.latency),) if text in shared]
    return " ".join((_RUNGS, *(_sentence(text[0].upper() + text[1:]) for text in told)))


def _samples(accuracy: Accuracy) -> str:
    if not measured(accuracy):
        return accuracy.reason or ""
    return f"{accuracy.metric} on {accuracy.samples} samples"


def _clock(latency: Latency) -> str:
    if latency.median_ms is None:
        return latency.reason or ""
    threads = f"{latency.threads} thread{'s' if latency.threads != 1 else ''}"
    return f"{timed(latency.measured_on)}, {threads}"


def _rung_row(report: Report, rung: Rung, number: int, shared: tuple[str, ...]) -> Row:
    word = outcome(report, rung)
    why = rung.dropped or rung.reason
    return (
        join(el("span", str(number), class_="number"), rung.name, _small(_form(rung)), _small(_counts(rung))),
        join(units.size(rung.size_bytes), _small(_memory(rung))),
        _accuracy_cell(rung.accuracy, shared),
        _drop_cell(rung.accuracy),
        _parity_cell(rung),
        join(_latency_cell(rung.latency, shared), _small(_zeros(rung))),
        _delegation_cell(rung),
        join(_pill(word, word.replace(" ", "-")), _small(why)),
    )


def _form(rung: Rung) -> str:
    word = "removed" if rung.pattern == "structured" else "zero"
    pruned = f", {rung.sparsity:.0%} {word}" if rung.sparsity else ""
    return f"{rung.pattern}, {rung.precision}{pruned}"


def _zeros(rung: Rung) -> str:
    """What the zeros brought, against the same graph with dense weights."""
    zeros = rung.sparse_execution
    if zeros is None:
        return ""
    low, high = zeros.ci95
    return f"its zeros bring {_whole(f'{zeros.gain:.2f}× [{low:.2f}, {high:.2f}]')} over dense weights"


def _counts(rung: Rung) -> str:
    return f"{_whole(units.count(rung.parameters))} parameters, {_whole(f'{units.count(rung.macs)} MACs')}"


def _memory(rung: Rung) -> str:
    return _whole(f"peak {units.size(rung.peak_memory_bytes)}") if rung.peak_memory_bytes is not None else ""


def _whole(text: str) -> str:
    """`text` that does not break over lines."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _accuracy_cell(accuracy: Accuracy, shared: tuple[str, ...]) -> Markup:
    value = units.score(accuracy.metric, accuracy.value) if measured(accuracy) else units.UNMEASURED
    return join(value, _unless_shared(_samples(accuracy), shared))


def _unless_shared(text: str, shared: tuple[str, ...]) -> Markup | None:
    return None if text in shared else _small(text)


def _drop_cell(accuracy: Accuracy) -> Markup:
    if not measured(accuracy):
        return join("–")
    interval = _whole(units.drop_between(accuracy.metric, accuracy.drop_ci95)) if accuracy.drop_ci95 else ""
    value = units.drop(accuracy.metric, accuracy.drop)
    return join(value, _small(interval), _verdict(accuracy.verdict), _small(accuracy.reason or ""))


def _parity_cell(rung: Rung) -> Markup:
    parity = rung.parity
    if parity is None:
        return join(units.UNMEASURED)
    agreement = f"top-1 agrees {parity.top1_agreement:.1%}" if parity.top1_agreement is not None else ""
    stuck = "" if parity.input_sensitive else "does not move with inputs"
    return join(f"{units.number(parity.snr_db)} dB", _small(agreement), _small(stuck))


def _latency_cell(latency: Latency, shared: tuple[str, ...]) -> Markup:
    where = _unless_shared(_clock(latency), shared)
    if latency.median_ms is None:
        return join(units.UNMEASURED, where)
    interval = _whole(units.between(latency.ci95_ms)) if latency.ci95_ms else "no interval"
    return join(units.milliseconds(latency.median_ms), _small(interval), where)


def _delegation_cell(rung: Rung) -> Markup:
    delegation = rung.delegation
    if delegation is None:
        return join("–")
    return join(f"{delegation.delegated} of {delegation.operators}", _small(delegation.delegate))


def _budget(report: Report) -> Markup | None:
    lines = report.manifest.budget
    if not lines:
        return None
    rung = shipped(report.manifest)
    metric = rung.accuracy.metric if rung else None
    rows: list[Row] = [
        (
            line.name,
            units.limit(line.name, line.limit, metric),
            units.limit(line.name, line.value, metric),
            _verdict(line.verdict),
            el("code", line.how, class_="command") if line.how else "",
        )
        for line in lines
    ]
    header = ("Limit", "Asked", "Found", "Verdict", "What would settle it")
    return _section("Budget", _table("Limits and what became of them.", header, rows, numeric=(1, 2)))


def _size(report: Report) -> Markup | None:
    drawn = charts.waterfall(report)
    return _section("Size", el("figure", drawn)) if drawn else None


def _pruning(report: Report) -> Markup | None:
    if not report.widths and not report.pruning:
        return None
    asked = [
        (
            a.quantity,
            "not asked" if a.asked is None else units.number(a.asked),
            units.number(a.achieved),
            a.note,
        )
        for a in report.pruning
    ]
    rows = [(w.layer, w.kind, str(w.before), str(w.after)) for w in report.widths]
    masks = [(m.layer, m.kind, str(m.weights), f"{m.zeros / m.weights:.1%}") for m in report.masks]
    return _section(
        "Pruning",
        _table("Asked and achieved.", ("Quantity", "Asked", "Achieved", "Note"), asked, numeric=(1, 2)),
        el("figure", charts.widths(report.widths), _caption(len(report.widths))) if report.widths else None,
        el("figure", charts.zeros(report.masks), _zeros_caption(len(report.masks))) if report.masks else None,
        _folded("Widths of all layers", ("Layer", "Kind", "Before", "After"), rows, numeric=(2, 3)),
        _folded("Zeros of all layers", ("Layer", "Kind", "Weights", "Zeros"), masks, numeric=(2, 3)),
    )


def _caption(layers: int) -> Markup:
    return el("figcaption", f"Output channels: outline before, filled after.{_of_layers(layers)}")


def _zeros_caption(layers: int) -> Markup:
    return el("figcaption", f"Weights: outline all, filled those that are not zero.{_of_layers(layers)}")


def _of_layers(layers: int) -> str:
    shown = charts.BARS_SHOWN
    return f" The {shown} layers that lost most of {layers}." if layers > shown else ""


def _sensitivity(report: Report) -> Markup | None:
    layers = report.sensitivity
    if not layers:
        return None
    more = (
        f" The {charts.BARS_SHOWN} most sensitive of {len(layers)}."
        if len(layers) > charts.BARS_SHOWN
        else ""
    )
    caption = (
        "Signal to noise of the output when this layer alone is quantized, on calibration data; "
        f"the shortest bars hurt most. Layers marked float were kept in float.{more}"
    )
    rows = [(s.layer, f"{units.number(s.snr_db)} dB", "yes" if s.kept_float else "no") for s in layers]
    return _section(
        "Sensitivity",
        el("figure", charts.sensitivity(layers), el("figcaption", caption)),
        _folded("Sensitivity of all layers", ("Layer", "SNR", "Kept float"), rows, numeric=(1,)),
    )


def _recovery(report: Report) -> Markup | None:
    points = report.recovery
    if not points:
        return None
    pictures = (
        charts.curve(points, lambda point: point.score, "Score on held-out training data"),
        charts.curve(points, lambda point: point.loss, "Training loss"),
    )
    names = ("Score on held-out training data", "Training loss")
    figures = [
        el("figure", el("figcaption", name), drawn)
        for name, drawn in zip(names, pictures, strict=True)
        if drawn is not None
    ]
    return _section("Recovery", el("div", figures, class_="pair"))


def _delegation(report: Report) -> Markup | None:
    rungs = [rung for rung in report.manifest.rungs if rung.delegation and rung.delegation.left]
    if not rungs:
        return None
    rung = shipped(report.manifest)
    shown = [rung] if rung in rungs else rungs[:1]
    tables = [_left_table(one) for one in shown if one is not None]
    return _section("Not delegated", *tables)


def _left_table(rung: Rung) -> Markup | None:
    left = rung.delegation.left if rung.delegation else []
    rows = [(el("code", one.operator), el("code", one.module), one.why) for one in left]
    delegate = rung.delegation.delegate if rung.delegation else ""
    caption = f"Operators of {rung.name} that run outside {delegate}."
    return _table(caption, ("Operator", "Module", "Why"), rows)


def _plan(report: Report) -> Markup:
    plan = report.plan
    steps = [(step.name, _forms(step.accepts, step.produces), step.reason) for step in plan.steps]
    refused = [(one.what, one.reason, one.instead) for one in plan.refused]
    notes = el("ul", [el("li", note) for note in plan.notes], class_="plain") if plan.notes else None
    return _section(
        "Plan",
        notes,
        _table("Steps and the reason for each.", ("Step", "Form", "Reason"), steps),
        _table("What was not done.", ("Refused", "Why", "Instead"), refused),
    )


def _forms(accepts: str, produces: str) -> str:
    return accepts if accepts == produces else f"{accepts} → {produces}"


def _interface(manifest: Manifest) -> Markup | None:
    tensors = [
        ("in", one.name, _shape(one.shape), one.dtype, _dynamic(one.dynamic)) for one in manifest.inputs
    ]
    tensors += [("out", one.name, _shape(one.shape), one.dtype, one.labels or "") for one in manifest.outputs]
    files = [(el("code", f.path), f.role, units.size(f.size_bytes), _hash(f.sha256)) for f in manifest.files]
    how = f"Run it with {manifest.recommended.threads} thread(s), batch {manifest.recommended.batch}."
    return _section(
        "Artifact",
        el("p", how),
        _table("Inputs and outputs.", ("", "Name", "Shape", "Type", "Dimensions, labels"), tensors),
        _table("Files of the build.", ("File", "Role", "Size", "SHA-256"), files, numeric=(2,)),
    )


def _shape(shape: Sequence[int | str]) -> str:
    return " × ".join(str(one) for one in shape) or "scalar"


def _dynamic(dynamic: dict[str, list[int]]) -> str:
    return ", ".join(
        f"{name} {' to '.join(str(bound) for bound in bounds)}" for name, bounds in dynamic.items()
    )


def _stages(report: Report) -> Markup | None:
    if not report.stages:
        return None
    cached = sum(stage.cached for stage in report.stages)
    worked = sum(
        stage.seconds for stage in report.stages if not stage.cached and math.isfinite(stage.seconds)
    )
    text = f"{units.seconds(worked)} of work; {cached} of {len(report.stages)} stages came from the cache."
    rows = [(stage.name, units.seconds(stage.seconds), stage.why) for stage in report.stages]
    return _section(
        "Stages",
        el("figure", charts.stages(report.stages), el("figcaption", text)),
        _folded("Why each stage ran or did not", ("Stage", "Duration", "Why"), rows, numeric=(1,)),
    )


def _origin(manifest: Manifest) -> Markup:
    environment, provenance = manifest.environment, manifest.provenance
    ran = [("python", environment.python), ("system", environment.os), ("processor", environment.cpu)]
    ran += [(name, version) for name, version in sorted(environment.packages.items())]
    machines = sorted({machine(r.latency.measured_on) for r in manifest.rungs if r.latency.measured_on})
    ran += [("latencies of", name) for name in machines]
    origin: list[Row] = [
        ("model", _hash(provenance.model_sha256)),
        ("calibration data", _hash(provenance.calibration_sha256)),
        ("configuration", _hash(provenance.config_sha256)),
        ("seed", str(provenance.seed)),
        ("licences", ", ".join(manifest.licences) or "none that asks for acceptance"),
    ]
    return _section(
        "Origin",
        _table("Where it was built.", ("What", "Value"), ran),
        _table("What went in (SHA-256).", ("What", "Value"), origin),
    )


def _hash(digest: str | None) -> Markup:
    return join("none") if digest is None else el("code", digest, class_="hash")


def _foot(manifest: Manifest) -> Markup:
    return el("footer", f"edge-deploy, manifest schema {manifest.schema_version}. This page loads nothing.")


def _small(text: str) -> Markup | None:
    return el("small", text) if text else None


def _verdict(verdict: str) -> Markup:
    return _pill(verdict, verdict)


def _pill(text: str, kind: str) -> Markup:
    return el("span", text, class_=f"pill {kind}")


def _folded(
    title: str, header: Sequence[str], rows: Sequence[Row], *, numeric: Sequence[int] = ()
) -> Markup | None:
    table = _table(title + ".", header, rows, numeric=numeric)
    return el("details", el("summary", title), table) if table else None


def _table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Row],
    *,
    numeric: Sequence[int] = (),
    marked: Sequence[str] = (),
) -> Markup | None:
    """A captioned table that a phone shows as cards; roles keep it a table there."""
    if not rows:
        return None
    align: Callable[[int], str | None] = lambda column: "numeric" if column in numeric else None  # noqa: E731
    heads = [
        el("th", name, scope="col", role="columnheader", class_=align(at)) for at, name in enumerate(header)
    ]
    body = [
        el("tr", _cells(header, row, align), role="row", class_=marked[at] if marked else None)
        for at, row in enumerate(rows)
    ]
    return el(
        "table",
        el("caption", caption),
        el("thead", el("tr", heads, role="row"), role="rowgroup"),
        el("tbody", body, role="rowgroup"),
        role="table",
        class_=f"columns-{len(header)}",
    )


def _cells(header: Sequence[str], row: Row, align: Callable[[int], str | None]) -> Iterable[Markup]:
    yield el("th", row[0], scope="row", role="rowheader")
    for at, child in enumerate(row[1:], 1):
        yield el("td", el("div", child), role="cell", data_label=header[at], class_=align(at))
