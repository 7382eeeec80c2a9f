"""deploy compare BUILD BUILD"""

from pathlib import Path

import click


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(a: Path, b: Path, as_json: bool) -> None:
    """What changed from build A to build B.

    A and B are build folders or manifest files. Latencies are compared by their 95% intervals, and
    only where both were measured on the same machine.
    """
    from deploy.manifest import encode, read
    from deploy.reporting.comparison import compare, render

    comparison = compare(read(a), read(b))
    click.echo(encode(comparison).decode() if as_json else render(comparison), nl=False)
