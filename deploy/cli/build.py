"""deploy build"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli import options

if TYPE_CHECKING:
    from deploy.building import Build
    from deploy.planner import Plan


@click.command("build")
@options.CONFIG
@options.TARGET
@options.choices
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(path_type=Path),
    help="Where builds go [default: build beside deploy.toml].",
)
@click.option("--no-ladder", is_flag=True, help="Build the planned rung alone.")
@click.option("--keep-rungs", is_flag=True, help="Write out the artifacts of the losing rungs too.")
@click.option("--require-delegated", is_flag=True, help="Refuse rungs with operators outside the delegate.")
@click.option("--require-measured", is_flag=True, help="Exit 6 when a verdict is unmeasured.")
@click.option("--no-cache", is_flag=True, help="Run every stage again.")
@click.option("--locked", is_flag=True, help="Rebuild with the configuration and versions of the last build.")
@click.option("--explain-cache", is_flag=True, help="Say for each stage why it ran again.")
@options.SEED
@options.JSON
@options.DRY_RUN
@options.VERBOSE
@options.QUIET
def command(
    config: Path,
    targets: tuple[str, ...],
    output_dir: Path | None,
    no_ladder: bool,
    keep_rungs: bool,
    require_delegated: bool,
    require_measured: bool,
    no_cache: bool,
    locked: bool,
    explain_cache: bool,
    seed: int,
    as_json: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """The whole pipeline: prune, recover, quantize, export, validate, measure, and publish the best rung."""
    from deploy.building import BuildOptions, require_buildable, run_build

    plans = options.plans(config, targets, ladder=not no_ladder, **choices)
    for plan in plans:
        require_buildable(plan)
    build_options = BuildOptions(
        output_dir=(output_dir or plans[0].project.folder / "build").absolute(),
        seed=seed,
        keep_rungs=keep_rungs,
        require_delegated=require_delegated,
        require_measured=require_measured,
        use_cache=not no_cache,
    )
    if locked:
        plans = [_locked(plan, build_options) for plan in plans]
    if dry_run:
        return _show_plans(plans, as_json)
    code = 0
    for plan in plans:
        with _progress(quiet=quiet or as_json, verbose=verbose and not as_json) as announce:
            build = run_build(plan, build_options, announce)
        _show(build, as_json=as_json, quiet=quiet, explain_cache=explain_cache)
        code = code or (build.marked.exit_code if build.marked else 0)
    return code


def _locked(plan: "Plan", build_options: Any) -> "Plan":
    from deploy.lockfile import read_lock
    from deploy.planner import make_plan

    folder = build_options.output_dir / plan.project.name / plan.target.name
    project, lock = read_lock(folder, plan.project)
    return make_plan(
        project,
        plan.target,
        runtimes=lock["runtimes"],
        objective=lock["objective"],
        accepted_licences=lock.get("licences", []),
        ladder=lock["ladder"],
    )


def _show_plans(plans: "list[Plan]", as_json: bool) -> int:
    from deploy.manifest import encode
    from deploy.reporting.notebook import plan_text

    for plan in plans:
        click.echo(encode(plan.record()).decode().rstrip() if as_json else plan_text(plan.record()))
    return 0


def _show(build: "Build", *, as_json: bool, quiet: bool, explain_cache: bool) -> None:
    from deploy.manifest import encode

    if as_json:
        click.echo(encode(build.manifest).decode().rstrip())
    elif not quiet:
        from rich.console import Console

        from deploy.reporting.terminal import print_summary

        if explain_cache:
            for stage in build.report.stages:
                state = "cached" if stage.cached else f"ran {stage.seconds:.1f} s"
                click.echo(f"{stage.name}: {state} ({stage.why})")
        print_summary(Console(highlight=False), build.report, build.folder)
    if build.marked:
        click.echo(f"deploy: {build.marked.message}", err=True)


@contextlib.contextmanager
def _progress(*, quiet: bool, verbose: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what runs: live on a terminal, one line a step with --verbose, else nothing."""
    if quiet or not (sys.stderr.isatty() or verbose):
        yield lambda text: None
    elif verbose:
        yield lambda text: click.echo(text, err=True)
    else:
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield status.update
