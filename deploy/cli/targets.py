"""deploy targets: the catalogue, one profile with the source of each fact, and this machine's profile."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from targets.errors import UsageError
from targets.profile import Chip, Target, fact_for, numbers

if TYPE_CHECKING:
    from rich.table import Table

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
config_option = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="deploy.toml whose own targets/ folder joins the catalogue (default: the current folder's).",
)


@click.group("targets", invoke_without_command=True)
@config_option
@as_json_option
@click.pass_context
def command(context: click.Context, config: Path | None, as_json: bool) -> None:
    """Targets by name; `show NAME` for one profile, `detect` for this machine."""
    context.obj = {"config": config, "as_json": as_json}
    if context.invoked_subcommand is None:
        from targets.catalog import all_targets

        listed = all_targets(project_folder=project_folder(config))
        _print_json(listed) if as_json else _print_list(listed)


@command.command("show")
@click.argument("name")
@config_option
@as_json_option
@click.pass_obj
def show(above: dict[str, Any], name: str, config: Path | None, as_json: bool) -> None:
    """One profile, with the source of each fact."""
    from targets.catalog import find

    target = find(name, project_folder=project_folder(config or above["config"]))
    _print_json(target) if as_json or above["as_json"] else _print_profile(target)


@command.command("detect")
@click.option("--device", default="host", show_default=True, help="What to look at.")
@as_json_option
@click.pass_obj
def detect(above: dict[str, Any], device: str, as_json: bool) -> None:
    """The profile of this machine, from what its operating system says."""
    if device != "host":
        raise UsageError(
            "this version detects its own machine only",
            found=f"--device {device}",
            expected="--device host",
            fix="name the device's target: `deploy targets` lists them",
        )
    from targets.detect import detect_host

    target = detect_host()
    _print_json(target) if as_json or above["as_json"] else _print_profile(target)


def project_folder(config: Path | None) -> Path:
    """The folder whose targets/ joins the catalogue: the one deploy.toml lies in."""
    if config is None:
        return Path()
    if not config.exists():
        raise UsageError(
            "the configuration is missing", found=config, fix="name an existing deploy.toml with --config"
        )
    return config if config.is_dir() else config.parent


def _print_json(value: Target | list[Target]) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _print_list(targets: list[Target]) -> None:
    from rich.console import Console
    from rich.markup import escape

    table = _table("target", "device", "chips", "runtimes in order of preference")
    for target in targets:
        chips = ", ".join(chip.name for chip in target.chips)
        runtimes = dict.fromkeys(runtime.name for chip in target.chips for runtime in chip.runtimes)
        table.add_row(*map(escape, (target.name, target.title, chips, ", ".join(runtimes))))
    Console().print(table)


def _print_profile(target: Target) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(target.name)}[/]: {escape(target.title)} ({escape(target.kind)})")
    if target.aliases:
        console.print(f"also called {escape(', '.join(target.aliases))}")
    for key, limit in target.budget.items():
        console.print(f"preset budget: {key} = {limit:g}")
    for word in (*target.notes, *target.links):
        console.print(f"- {escape(word)}")
    for chip in target.chips:
        console.print(f"\n[bold]{escape(chip.title)}[/] ({escape(chip.name)}, {escape(chip.architecture)})")
        before = ""
        for path, value, source in _facts(chip):
            console.print(f"  {escape(path)}: {escape(value)}")
            if source not in ("", before):
                console.print(f"      [dim]{escape(source)}[/]")
            before = source


def _facts(chip: Chip) -> Iterator[tuple[str, str, str]]:
    """Path, value and source of what a chip states."""
    clusters = ", ".join(
        f"{cluster.cores} x {cluster.name}" + (f" {cluster.max_ghz:g} GHz" if cluster.max_ghz else "")
        for cluster in chip.clusters
    )
    stated = {"clusters": clusters, "features": ", ".join(chip.features)}
    for unit in chip.accelerators:
        stated[f"accelerators.{unit.kind}"] = unit.name
        stated[f"accelerators.{unit.kind}.features"] = ", ".join(unit.features)
    for runtime in chip.runtimes:
        terms = f", needs licence {runtime.licence}" if runtime.licence else ""
        stated[f"runtimes.{runtime.name}"] = (
            f"{runtime.unit}, {runtime.threads} threads, {', '.join(runtime.precisions)}{terms}"
        )
    stated |= {path: f"{number:g}" for path, number in numbers(chip).items()}
    for path, value in stated.items():
        if value:
            yield path, value, _source(chip, path)


def _source(chip: Chip, path: str) -> str:
    fact = fact_for(chip, path)
    if fact is None:
        return ""
    return f"{fact.source}. {fact.note}" if fact.note else fact.source


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
