"""deploy bundle"""

from pathlib import Path

import click

from deploy.cli import options


@click.command("bundle")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--for", "purpose", required=True, type=click.Choice(["server"]), help="Who ships it.")
@click.option(
    "-o", "--output-dir", required=True, type=click.Path(path_type=Path), help="The bundle's folder."
)
@click.option("--archive", is_flag=True, help="Also write the folder as a .tar.gz beside it.")
@click.option("--grpc", is_flag=True, help="Its requirements have what serve.py --grpc-port needs.")
@options.JSON
def command(build: Path, purpose: str, output_dir: Path, archive: bool, grpc: bool, as_json: bool) -> None:
    """What ships a finished build: for a server a folder that installs and serves it without torch."""
    import json

    from deploy.bundling.server import server_bundle
    from deploy.bundling.writing import write_archive, write_folder

    files = server_bundle(build, lambda text: None if as_json else click.echo(text, err=True), grpc=grpc)
    write_folder(output_dir, files)
    packed = output_dir.with_name(f"{output_dir.name}.tar.gz")
    if archive:
        write_archive(packed, files, top=output_dir.name)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(output_dir),
                    "archive": str(packed) if archive else None,
                    "files": len(files),
                    "size_bytes": size,
                }
            )
        )
        return
    click.echo(f"{len(files)} files, {size / 1e6:.1f} MB: {output_dir}{f' and {packed}' if archive else ''}")
    click.echo(f"  {output_dir / 'README.md'} holds the three commands that install, check and serve it")
