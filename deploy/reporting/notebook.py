"""How plans and builds print in a console and in a notebook."""

import io
from pathlib import Path

from deploy.manifest import PlanRecord, Report
from deploy.reporting.markup import Markup, el

COLUMNS = 100


def plan_text(record: PlanRecord) -> str:
    """A plan as text."""
    chosen = f"{record.runtime}, {record.pattern}, {record.precision}"
    head = f"{record.model} for {record.target} ({record.chip}): {chosen}"
    lines = [head, ""]
    lines += [f"  {number}. {step.name}: {step.reason}" for number, step in enumerate(record.steps, 1)]
    lines += ["", f"  rungs: {', '.join(record.rungs)}"]
    lines += [f"  note: {note}" for note in record.notes]
    lines += [f"  refused: {r.what}: {r.reason}. Instead: {r.instead}." for r in record.refused]
    return "\n".join(lines)


def build_text(report: Report, folder: Path) -> str:
    """What `deploy build` prints, without colours."""
    from rich.console import Console

    from deploy.reporting.terminal import print_summary

    written = io.StringIO()
    print_summary(Console(file=written, width=COLUMNS, highlight=False, no_color=True), report, folder)
    return written.getvalue().rstrip()


def build_html(report: Report, folder: Path) -> str:
    """The rungs as a table, the shipped one in bold, and where the whole report lies."""
    from deploy.reporting.claims import headline, outcome
    from deploy.reporting.terminal import figures

    names = ("rung", "size", "accuracy", "drop", "latency, ms", "")
    rows = [el("tr", *(el("th", name) for name in names))]
    for rung in report.manifest.rungs:
        word = outcome(report, rung)
        cell = "th" if word == "shipped" else "td"
        rows.append(el("tr", *(el(cell, text) for text in (rung.name, *figures(rung), word))))
    place = str(folder / "report.html")
    return str(el("div", el("p", headline(report)), el("table", Markup("".join(rows))), el("p", place)))
