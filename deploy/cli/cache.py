"""deploy cache size, list, verify, prune"""

import time
from typing import TYPE_CHECKING, Any

import click

from deploy.cli import options
from targets.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from deploy.cache import Cache
    from deploy.inventory import Freed, Stored


AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
NUMBERS = ("size", "took", "age", "unused")


@click.group("cache")
def command() -> None:
    """Finished stages of earlier builds, in $EDGE_DEPLOY_CACHE, else $XDG_CACHE_HOME/edge-deploy.

    Everything in it can be made again: removing it costs time and no result.
    """


@command.command("size")
@options.JSON
def size(as_json: bool) -> None:
    """Where the cache lies, and how much it holds."""
    from deploy import inventory
    from deploy.reporting import units

    found = inventory.size(_cache())
    if as_json:
        return _print_json(found)
    click.echo(f"{found.root}: {units.size(found.size_bytes)} in {_entries(found.entries)}")
    return None


@command.command("list")
@options.JSON
def list_entries(as_json: bool) -> None:
    """Every entry: its stage, size, age and last use, the longest unused first."""
    from deploy import inventory

    entries = inventory.stored(_cache())
    _print_json(entries) if as_json else _print_table(entries)


@command.command("verify")
@click.option("--repair", is_flag=True, help="Remove the damaged entries; they are made again when needed.")
@options.JSON
def verify(repair: bool, as_json: bool) -> None:
    """Compares every entry's files with their hashes; exits 8 naming the damaged ones."""
    from deploy import inventory

    cache = _cache()
    entries = inventory.damaged(cache)
    if not repair and entries:
        raise IntegrityError(
            f"the cache {cache.root} is damaged",
            found="; ".join(f"{entry.stage or 'entry'} {entry.key}: {entry.damage}" for entry in entries),
            expected="files with the hashes of their record",
            fix="run deploy cache verify --repair: they are made again when needed",
        )
    if repair:
        inventory.remove(cache, entries)
    if as_json:
        return _print_json({"removed" if repair else "damaged": entries})
    for entry in entries:
        click.echo(f"removed {entry.stage or 'entry'} {entry.key}: {entry.damage}")
    if not entries:
        click.echo("every entry is what its record says")
    return None


@command.command("prune")
@click.option("--all", "everything", is_flag=True, help="Empty the cache.")
@click.option("--older-than", type=float, metavar="DAYS", help="Remove what no build used for so long.")
@options.JSON
def prune(everything: bool, older_than: float | None, as_json: bool) -> None:
    """Removes entries: all of them, or those unused for some days."""
    from deploy import inventory

    if everything == (older_than is not None):
        raise UsageError(
            "deploy cache prune must be told what goes",
            found="both" if everything else "neither",
            expected="--all or --older-than DAYS",
        )
    if older_than is not None and not 0 <= older_than < float("inf"):
        raise UsageError("--older-than is out of range", found=older_than, expected="days, 0 or more")
    cache = _cache()
    freed = inventory.remove_all(cache) if older_than is None else inventory.remove_unused(cache, older_than)
    _print_json(freed) if as_json else _print_freed(freed)


def _cache() -> "Cache":
    from deploy.cache import Cache
    from exporters.cache_root import cache_root

    return Cache(cache_root())


def _print_freed(freed: "Freed") -> None:
    from deploy.reporting import units

    click.echo(f"removed {_entries(freed.entries)}, {units.size(freed.size_bytes)}")


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _print_table(entries: "list[Stored]") -> None:
    from rich.console import Console
    from rich.table import Table

    from deploy.reporting import units

    if not entries:
        click.echo("the cache is empty")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "size", "took", "age", "unused", "key"):
        table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=True)
    for entry in entries:
        size, made, used = units.size(entry.size_bytes), _age(entry.created), _age(entry.last_used)
        table.add_row(
            entry.stage or "(damaged)", size, units.seconds(entry.seconds), made, used, entry.key[:12]
        )
    Console(highlight=False).print(table)


def _age(moment: float) -> str:
    """The time since then in the largest unit that it fills."""
    past = max(time.time() - moment, 0)
    name, seconds = next((unit for unit in AGES if past >= unit[1]), AGES[-1])
    return f"{past / seconds:.0f} {name}"


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
