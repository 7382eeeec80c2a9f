"""deploy validate"""

from pathlib import Path

import click

from deploy.cli import options


@click.command("validate")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--device", default="host", show_default=True, help="Where to measure; this version: host.")
@options.JSON
def command(build: Path, device: str, as_json: bool) -> None:
    """A finished build again: file hashes, golden pair, latency and memory on this machine."""
    from deploy.manifest import encode
    from deploy.validation.again import validate_build

    measured = validate_build(build, device=device)
    if as_json:
        click.echo(encode(measured).decode().rstrip())
        return
    from deploy.reporting import units

    latency = measured.latency
    machine = latency.measured_on.cpu if latency.measured_on else "this machine"
    click.echo(f"{measured.rung}: files are whole, the golden pair holds ({measured.golden_snr_db:.1f} dB)")
    click.echo(
        f"  {units.milliseconds(latency.median_ms)} {units.between(latency.ci95_ms or [])} on {machine}, "
        f"{latency.threads} threads, {units.size(measured.peak_memory_bytes)} of memory"
    )
