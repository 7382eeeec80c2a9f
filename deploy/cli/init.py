"""deploy init [MODEL]"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.cli import options

if TYPE_CHECKING:
    from deploy.initialise import Initialised


@click.command("init")
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="deploy.toml or its folder [default: beside model.py; here for a Hugging Face folder].",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:SHAPE:DTYPE",
    help="An input instead of a guess, as image:batch,3,32,32:float32; may be given again.",
)
@click.option("--force", is_flag=True, help="Replace a deploy.toml that is there.")
@options.JSON
@options.DRY_RUN
@options.QUIET
def command(
    model: str | None,
    output: Path | None,
    inputs: tuple[str, ...],
    force: bool,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Looks at a model and writes a commented deploy.toml that builds as it is.

    MODEL is model.py:build, a model.py with one factory, or a Hugging Face folder [default: model.py
    here]. The model is loaded and run on guessed inputs; weights, data and labels beside it are used
    where they fit. With --dry-run the file is printed and not written.
    """
    from deploy.initialise import initialise

    done = initialise(model, output=output, inputs=inputs, force=force, dry_run=dry_run)
    if as_json:
        _show_json(done)
    elif dry_run:
        click.echo(done.text, nl=False)
    elif not quiet:
        _show(done)


def _show_json(done: "Initialised") -> None:
    import json

    data = {"source": done.source, "weights": done.weights, "data": dict(done.data), "notes": done.notes}
    click.echo(json.dumps({"file": str(done.file), **data, "text": done.text}))


def _show(done: "Initialised") -> None:
    click.echo(f"wrote {done.file}")
    click.echo(f"  model: {done.source}{f' with {done.weights}' if done.weights else ''}")
    for table, source in done.data.items():
        click.echo(f"  {table}: {source}")
    if "calibration" not in done.data:
        click.echo("  calibration: synthetic; accuracy stays unmeasured until there is real data")
    for note in done.notes:
        click.echo(f"  note: {note}")
    click.echo(f"next: deploy build --target {done.target}")
