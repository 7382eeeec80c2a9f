"""deploy plan"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli import options

if TYPE_CHECKING:
    from deploy.manifest import PlanRecord


@click.command("plan")
@options.CONFIG
@options.TARGET
@options.choices
@options.JSON
@options.DRY_RUN
def command(config: Path, targets: tuple[str, ...], as_json: bool, dry_run: bool, **choices: Any) -> None:
    """The steps for a target, the reason for each, and what was refused. Loads no model."""
    from deploy.manifest import encode

    records = [plan.record() for plan in options.plans(config, targets, **choices)]
    if as_json:
        texts = [encode(record).decode().rstrip() for record in records]
        click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]")
        return
    for record in records:
        click.echo(describe(record))


def describe(record: "PlanRecord") -> str:
    """A plan as text."""
    chosen = f"{record.runtime}, {record.pattern}, {record.precision}"
    head = f"{record.model} for {record.target} ({record.chip}): {chosen}"
    lines = [head, ""]
    lines += [f"  {number}. {step.name}: {step.reason}" for number, step in enumerate(record.steps, 1)]
    lines += ["", f"  rungs: {', '.join(record.rungs)}"]
    lines += [f"  note: {note}" for note in record.notes]
    lines += [f"  refused: {r.what}: {r.reason}. Instead: {r.instead}." for r in record.refused]
    return "\n".join(lines)
