"""deploy doctor"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from deploy.cli import options

if TYPE_CHECKING:
    from deploy.diagnosis import Diagnosis, Finding

STYLES = {"broken": "bold red", "warning": "bold yellow", "optional": "cyan", "ok": "green"}


@click.command("doctor")
@click.option("--deep", is_flag=True, help="Also lower and run a two-layer model with each exporter.")
@options.JSON
def command(deep: bool, as_json: bool) -> int:
    """The environment, versions, runtimes, SDKs and licences, the worst first, each with its fix.

    Exits 0 when builds can work here, 3 when something keeps all of them from working.
    """
    from deploy.diagnosis import diagnose
    from deploy.manifest import encode

    with _progress(quiet=as_json) as announce:
        diagnosis = diagnose(deep=deep, announce=announce)
    if as_json:
        click.echo(encode(diagnosis).decode(), nl=False)
    else:
        _print(diagnosis)
    return diagnosis.exit_code


def _print(diagnosis: "Diagnosis") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("state", "area", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in diagnosis.findings:
        table.add_row(*_row(finding))
    console.print(table)
    console.print(f"\n{_verdict(diagnosis)}", markup=False)


def _row(finding: "Finding") -> tuple[str, ...]:
    from rich.markup import escape

    style = STYLES[finding.severity]
    cell = escape(finding.found)
    if finding.expected and finding.severity != "ok":
        cell += f"; expected {escape(finding.expected)}"
    if finding.fix:
        cell += f"\n[bold]{escape(finding.fix)}[/]"
    return (f"[{style}]{finding.severity}[/]", escape(finding.area), escape(finding.name), cell)


def _verdict(diagnosis: "Diagnosis") -> str:
    broken = [finding.name for finding in diagnosis.findings if finding.severity == "broken"]
    if broken:
        return f"No build can work here yet: {', '.join(broken)}."
    return f"Builds can use {', '.join(diagnosis.usable)}."


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is being tried, live on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("looking") as status:
        yield status.update
