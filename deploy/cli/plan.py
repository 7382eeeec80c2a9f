"""deploy plan"""

from pathlib import Path
from typing import Any

import click

from deploy.cli import options


@click.command("plan")
@options.CONFIG
@options.TARGET
@options.choices
@options.JSON
@options.DRY_RUN
def command(config: Path, targets: tuple[str, ...], as_json: bool, dry_run: bool, **choices: Any) -> None:
    """The steps for a target, the reason for each, and what was refused. Loads no model."""
    from deploy.manifest import encode
    from deploy.reporting.notebook import plan_text

    records = [plan.record() for plan in options.plans(config, targets, **choices)]
    if as_json:
        texts = [encode(record).decode().rstrip() for record in records]
        click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]")
        return
    for record in records:
        click.echo(plan_text(record))
