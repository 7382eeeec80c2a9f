"""The summary a build prints: the rungs, what was dropped and why, what limits them, where the report is."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deploy.manifest import Accuracy, Latency, Report, Rung
from deploy.reporting import units
from deploy.reporting.claims import Notice, chosen_by, headline, notices, outcome
from deploy.reporting.evidence import measured, shipped, timed
from deploy.reporting.markup import clean

WIDEST_NAME = 42
WIDEST = 1000
_STYLES = {"alarm": "bold red", "caution": "bold yellow", "note": "bold"}
_MARKS = {"shipped": "* ", "dropped": "x "}

# For terminals that cannot show them.
_ASCII = str.maketrans(
    {units.MINUS: "-", "×": "x", "∞": "inf", "→": "->", "–": "-", "…": "...", "\u00a0": " "}
)


def print_summary(console: Console, report: Report, folder: Path) -> None:
    """Prints the summary of a build in `folder`; its last line is the path of report.html."""
    manifest = report.manifest
    title = f"{manifest.model} on {manifest.target}: {chosen_by(report).lower()}"
    console.print(_text(console, title, "bold"))
    console.print(_text(console, headline(report)))
    if manifest.rungs:
        console.print()
        table, whole = _table(console, report)
        console.print(table)
        console.print(_text(console, _legend(report, whole), "dim"))
    for line in _dropped(report):
        console.print(Padding(_text(console, line), (0, 0, 0, 2), expand=False))
    console.print()
    for notice in notices(report, build=str(folder)):
        _print_notice(console, notice)
    console.print(_text(console, str(folder / "report.html")), soft_wrap=True)


def _text(console: Console, text: str, style: str = "") -> Text:
    """`text` taken literally: no markup, no control characters, nothing the terminal cannot encode."""
    shown = clean(text)
    try:
        shown.encode(console.encoding)
    except UnicodeEncodeError:
        shown = shown.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)
    return Text(shown, style=style)


def _table(console: Console, report: Report) -> tuple[Table, bool]:
    """The rungs; intervals are left out where they would not fit beside the names."""
    whole = _filled(console, report, intervals=True)
    if console.measure(whole, options=console.options.update(max_width=WIDEST)).maximum <= console.width:
        return whole, True
    return _filled(console, report, intervals=False), False


def _filled(console: Console, report: Report, *, intervals: bool) -> Table:
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    longest = max(len(rung.name) for rung in report.manifest.rungs)
    table.add_column("Rung", overflow="fold", min_width=min(longest + 2, WIDEST_NAME))
    for name in ("Size", "Accuracy", "Drop", "Latency, ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for rung in report.manifest.rungs:
        word = outcome(report, rung)
        shown = figures(rung) if intervals else tuple(cell.partition(" [")[0] for cell in figures(rung))
        cells = (_MARKS.get(word, "  ") + rung.name, *shown)
        style = {"shipped": "bold", "dropped": "dim"}.get(word, "")
        table.add_row(*(_text(console, cell) for cell in cells), style=style)
    return table


def figures(rung: Rung) -> tuple[str, str, str, str]:
    """Size, accuracy, drop and latency as people read them."""
    return units.size(rung.size_bytes), _accuracy(rung.accuracy), _drop(rung.accuracy), _latency(rung.latency)


def _accuracy(accuracy: Accuracy) -> str:
    return units.score(accuracy.metric, accuracy.value) if measured(accuracy) else units.UNMEASURED


def _drop(accuracy: Accuracy) -> str:
    if not measured(accuracy) or accuracy.drop is None:
        return ""
    value = units.drop(accuracy.metric, accuracy.drop, unit=False)
    if not accuracy.drop_ci95:
        return value
    return f"{value} {units.drop_between(accuracy.metric, accuracy.drop_ci95)}"


def _latency(latency: Latency) -> str:
    if latency.median_ms is None:
        return units.UNMEASURED
    interval = f" {units.between(latency.ci95_ms)}" if latency.ci95_ms else ""
    return f"{units.number(latency.median_ms)}{interval}"


def _legend(report: Report, intervals: bool) -> str:
    """What the marks and columns mean, and the metric and machine of the shipped rung."""
    marks = [f"{_MARKS[word].strip()} {word}" for word in ("shipped", "dropped") if _any(report, word)]
    rung = shipped(report.manifest)
    parts = ["; ".join(marks)] if marks else []
    if rung and measured(rung.accuracy):
        unit = " in points" if rung.accuracy.metric in units.FRACTIONS else ""
        unit += " [95% interval]" if intervals else ""
        parts.append(f"{rung.accuracy.metric} on {rung.accuracy.samples} samples, drop{unit}")
    if rung and rung.latency.median_ms is not None:
        parts.append(f"latency {timed(rung.latency.measured_on)}")
    return "; ".join(parts)


def _any(report: Report, word: str) -> bool:
    return any(outcome(report, rung) == word for rung in report.manifest.rungs)


def _dropped(report: Report) -> Iterator[str]:
    for rung in report.manifest.rungs:
        if rung.dropped and rung.name != report.manifest.shipped_rung:
            yield f"{rung.name} dropped: {rung.dropped}"


def _print_notice(console: Console, notice: Notice) -> None:
    title = _text(console, f"{notice.title}: ", _STYLES[notice.severity])
    console.print(title.append_text(_text(console, notice.text)))
    if notice.command:
        console.print(Text("  ").append_text(_text(console, notice.command)), soft_wrap=True)
