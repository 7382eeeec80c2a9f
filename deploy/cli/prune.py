"""deploy prune CHECKPOINT -o OUT"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli import options
from targets.errors import ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from torch import nn

    from calibration.dataset import Dataset
    from calibration.spec import TensorSpec
    from deploy.project import Project, PruneTable
    from deploy.pruning.folder import Origin, PrunedModel
    from targets.profile import Target

CONFIG_NAME = "deploy.toml"
FLAGS_NAME = "the command line"  # stands for deploy.toml in messages where there is none
EXAMPLE_SAMPLES = 32
REMOVABLE = ("auto", "structured", "none")


@click.command("prune")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output-dir", type=click.Path(path_type=Path), required=True, help="The folder to write."
)
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="deploy.toml or its folder [default: beside the checkpoint].",
)
@click.option("--model", metavar="FILE.py:FACTORY", help="The factory instead of deploy.toml's.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:SHAPE:DTYPE",
    help="An input instead of deploy.toml's, as image:batch,3,32,32:float32; may be given again.",
)
@click.option("--sparsity", type=float, help="The fraction to remove [default: deploy.toml's, else 0.3].")
@click.option("--of", help="What it is a fraction of: macs or parameters.")
@click.option("--method", help="What is removed: auto or channels.")
@click.option("--criterion", help="How channels are ranked: auto, l1, l2, bn, taylor, median, random.")
@click.option("--ranking", help="global or local: one ranking for all layers, or one for each.")
@click.option("--min-channels", type=int, help="No layer becomes narrower [default: 8].")
@click.option("--multiple", type=int, help="Widths are multiples of it [default: the target's, else 1].")
@click.option("--target", metavar="NAME", help="The hardware whose preferred runtime gives the multiple.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules to leave alone; may be repeated.")
@click.option("--force", is_flag=True, help="Replace an earlier result of this command.")
@options.SEED
@options.JSON
@options.DRY_RUN
@options.VERBOSE
@options.QUIET
def command(
    checkpoint: Path,
    output_dir: Path,
    config: Path | None,
    model: str | None,
    inputs: tuple[str, ...],
    target: str | None,
    multiple: int | None,
    exclude: tuple[str, ...],
    force: bool,
    seed: int,
    as_json: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """A training checkpoint comes back smaller, as a folder that loads without this tool.

    CHECKPOINT is a .safetensors or .pt file: a state dict, or {model, optimizer, step, ...}, whose
    optimizer state is cut like the weights so that training goes on. The factory of the dense model
    comes from the deploy.toml beside it, or from --model. With --dry-run everything is tried and
    nothing written.
    """
    from deploy.pruning.folder import check_output

    check_output(output_dir, force=force)
    job = _job(
        checkpoint, config, model, inputs, flags | {"exclude": list(exclude) or None}, target, multiple
    )
    say = _say if verbose and not (quiet or as_json) else _nothing
    with contextlib.redirect_stdout(sys.stderr):  # what the user's model prints is not the result
        pruned = _run(job, None if dry_run else output_dir, force=force, seed=seed, say=say)
    if as_json:
        from deploy.manifest import encode

        click.echo(encode(pruned.record).decode(), nl=False)
    elif not quiet:
        from rich.console import Console

        _show(Console(highlight=False), pruned, job)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything resolved before the first weight is read."""

    checkpoint: Path
    project: "Project"
    factory: str
    factory_folder: Path
    has_file: bool
    multiple: int
    target: str | None
    runtime: str | None

    @property
    def settings(self) -> "PruneTable":
        return self.project.tables.prune


def _job(
    checkpoint: Path,
    config: Path | None,
    model: str | None,
    inputs: tuple[str, ...],
    flags: "Mapping[str, Any]",
    target_name: str | None,
    multiple: int | None,
) -> _Job:
    from targets.catalog import find

    _require_file(checkpoint)
    file = _config_file(checkpoint, config)
    if file is None and model is None:
        raise UsageError(
            "the factory of the dense model is unknown",
            found=f"no {CONFIG_NAME} beside {checkpoint}",
            expected="a deploy.toml with [model] source, or a factory",
            fix="name them with -c deploy.toml, or with --model model.py:build and --input",
        )
    project = _project(file, model, inputs)
    target = find(target_name, project_folder=project.folder) if target_name else None
    if target:
        project = project.for_target(target.name, *(chip.name for chip in target.chips))
    project = project.override({"prune": flags})
    _check_pattern(project)
    runtime, own = _runtime(project, target) if target else (None, 1)
    source = project.tables.model.source
    folder = (Path.cwd() / source.rpartition(":")[0]).parent if model else project.folder
    return _Job(
        checkpoint=checkpoint,
        project=project,
        factory=Path(source).name if model else source,
        factory_folder=folder,
        has_file=file is not None,
        multiple=own if multiple is None else multiple,
        target=target.name if target else None,
        runtime=runtime,
    )


def _require_file(checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise UsageError(
            "the checkpoint is no file",
            found=f"the folder {checkpoint}" if checkpoint.is_dir() else f"nothing at {checkpoint}",
            expected="a .safetensors or .pt file with the trained weights",
            fix="name the file that training saved",
        )


def _config_file(checkpoint: Path, config: Path | None) -> Path | None:
    if config is not None:
        return config
    beside = checkpoint.absolute().parent / CONFIG_NAME
    return beside if beside.exists() else None


def _project(file: Path | None, model: str | None, inputs: tuple[str, ...]) -> "Project":
    """deploy.toml with --model and --input laid over, or these alone."""
    import msgspec

    from deploy import project as projects

    given = dict(map(_input, inputs))
    if file is not None:
        project = projects.load(file)
        tables = msgspec.to_builtins(project.tables)
        if model:
            tables["model"] = {**tables["model"], "source": model}
        return project.with_tables({**tables, "inputs": given or tables["inputs"]})
    if not given:
        raise UsageError(
            "the inputs of the model are unknown",
            found=f"--model without {CONFIG_NAME} and without --input",
            expected="each input's name, shape and dtype",
            fix="for example --input image:batch,3,32,32:float32",
        )
    tables = {"model": {"source": model}, "inputs": given}
    return projects.Project(file=Path.cwd() / FLAGS_NAME, tables=projects.check(tables, origin=FLAGS_NAME))


def _input(text: str) -> tuple[str, dict[str, Any]]:
    """ "image:batch,3,32,32:float32" as a table of [inputs]; the dtype may be left out."""
    name, _, rest = text.partition(":")
    shape, _, dtype = rest.partition(":")
    sizes = [size.strip() for size in shape.split(",")]
    if not name or not all(sizes):
        raise UsageError(
            "--input does not fit",
            found=repr(text),
            expected="NAME:SHAPE:DTYPE",
            fix="for example --input image:batch,3,32,32:float32",
        )
    numbers: list[int | str] = [int(size) if size.lstrip("-").isdecimal() else size for size in sizes]
    return name, {"shape": numbers, "dtype": dtype or "float32"}


def _check_pattern(project: "Project") -> None:
    pattern = project.tables.prune.pattern
    if pattern not in REMOVABLE:
        raise UsageError(
            f"deploy prune makes no {pattern} masks",
            found=f"prune.pattern = {pattern!r}",
            expected="structured pruning, which gives a smaller dense model",
            fix='set pattern = "structured" or "auto"',
        )


def _runtime(project: "Project", target: "Target") -> tuple[str, int]:
    """The target's preferred runtime at hand, and the channel multiple that it wants."""
    from deploy.planner import make_plan

    neutral = project.override({"prune": {"pattern": "none"}, "quantize": {"precision": "auto"}})
    runtime = make_plan(neutral, target).runtime
    return runtime.name, runtime.channel_multiple


def _run(job: _Job, out: Path | None, *, force: bool, seed: int, say: Any) -> "PrunedModel":
    import torch

    from calibration.spec import usable_batch
    from deploy.data import ProjectData
    from deploy.planner import DEFAULT_SPARSITY
    from deploy.pruning.folder import prune
    from exporters.capture import order_inputs

    settings, specs = job.settings, job.project.specs()
    say(f"loading {job.checkpoint}")
    module, training = _load(job)
    data = ProjectData(job.project, seed).calibration
    batch = data.batch(0, usable_batch(specs, EXAMPLE_SAMPLES))
    ordered, _ = order_inputs(module, specs)
    say("pruning")
    return prune(
        module,
        tuple(torch.from_numpy(batch[spec.name]) for spec in ordered),
        sparsity=DEFAULT_SPARSITY["structured"] if settings.sparsity is None else settings.sparsity,
        of=settings.of,
        method=settings.method,
        criterion=settings.criterion,  # type: ignore[arg-type]
        ranking=settings.ranking,
        min_channels=settings.min_channels,
        channel_multiple=job.multiple,
        exclude=settings.exclude,
        loss=_loss(data, specs) if settings.criterion == "taylor" else None,
        seed=seed,
        checkpoint=training,
        output_dir=out,
        force=force,
        name=job.project.name if job.has_file else job.factory.partition(".")[0],
        origin=_origin(job, data.origin),
    )


def _load(job: _Job) -> "tuple[nn.Module, Mapping[str, Any] | None]":
    """The dense module with its weights, and the whole checkpoint where it is more than weights."""
    from deploy.model import run_factory
    from deploy.pruning.folder import without_prefix
    from deploy.weights import assign, find_state, load_checkpoint

    held = load_checkpoint(job.checkpoint)
    _refuse_pruned(job.checkpoint)
    state = find_state(held)
    if state is None:
        raise _no_state(job.checkpoint, held)
    module = run_factory(job.factory, job.factory_folder)
    assign(module, without_prefix(state), origin=job.checkpoint.name)
    return module.eval(), None if held.keys() == state.keys() else held


def _no_state(checkpoint: Path, held: "Mapping[str, Any]") -> ModelError:
    from deploy.weights import STATE_KEYS

    return ModelError(
        f"{checkpoint.name} holds no weights of the model",
        found=f"the keys {', '.join(map(str, list(held)[:6]))}" if held else "nothing",
        expected=f"a state dict, itself or under {', '.join(STATE_KEYS)}",
        fix="save {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), ...}",
    )


def _refuse_pruned(checkpoint: Path) -> None:
    """A file of this command carries its architecture; the factory's dense one would not fit it."""
    if checkpoint.suffix != ".safetensors":
        return
    from safetensors import safe_open

    from deploy.pruning.delta import METADATA_KEY

    with safe_open(str(checkpoint), framework="pt") as stream:
        pruned = METADATA_KEY in (stream.metadata() or {})
    if pruned:
        raise UsageError(
            f"{checkpoint} is pruned already",
            found="the record of what was removed in its metadata",
            expected="the weights of the dense model that the factory makes",
            fix="prune the dense checkpoint with a higher --sparsity",
        )


def _loss(data: "Dataset", specs: "tuple[TensorSpec, ...]") -> Any:
    from deploy.pruning.objective import calibration_loss

    return calibration_loss(data, specs, batch=EXAMPLE_SAMPLES)


def _origin(job: _Job, example_inputs: str) -> "Origin":
    from deploy import usercode
    from deploy.cache import digest, file_digest
    from deploy.pruning.folder import Origin

    root = job.factory_folder.resolve()
    code = {str(file.relative_to(root)): file_digest(file) for file in usercode.local_files(root)}
    return Origin(
        checkpoint=job.checkpoint.name,
        checkpoint_sha256=file_digest(job.checkpoint),
        factory=job.factory,
        code_sha256=digest(code),
        config_sha256=file_digest(job.project.file) if job.has_file else None,
        example_inputs=example_inputs,
        target=job.target,
        runtime=job.runtime,
    )


def _show(console: "Console", pruned: "PrunedModel", job: _Job) -> None:
    """Asked and achieved, the costs, the widths, what was spared, and the next step."""
    from rich.text import Text

    from deploy.reporting.markup import clean

    record = pruned.record

    def line(text: str, style: str = "") -> None:
        console.print(Text(clean(text), style=style), soft_wrap=True)

    line(f"{record.model}: {record.asked:.1%} of {record.of} asked, {record.achieved:.1%} removed", "bold")
    if record.note:
        line(record.note, "yellow")
    console.print(_cost_table(pruned))
    console.print(_width_table(pruned))
    for reason, layers in _spared(pruned).items():
        line(f"spared {', '.join(layers)}: {reason}", "dim")
    if pruned.folder is None:
        line("dry run: nothing was written")
        return
    line(f"written to {pruned.folder}")
    factory = job.factory.rpartition(":")[2]
    line(f"next: train on from load.load({factory}); {_next(pruned)}")


def _next(pruned: "PrunedModel") -> str:
    from deploy.pruning.folder import CHECKPOINT

    if pruned.checkpoint is None:
        return "accuracy comes back with some epochs of training (load.py says how to load it)"
    return f"its weights and optimizer state are in {CHECKPOINT} (load.py says how to load them)"


def _cost_table(pruned: "PrunedModel") -> Any:
    from deploy.reporting import units

    table = _table("", "before", "after", "removed")
    before, after = pruned.record.before, pruned.record.after
    for name, old, new in (
        ("MACs", before.macs, after.macs),
        ("parameters", before.parameters, after.parameters),
    ):
        table.add_row(name, units.count(old), units.count(new), f"{1 - new / old:.1%}" if old else "")
    return table


def _width_table(pruned: "PrunedModel") -> Any:
    from rich.text import Text

    from deploy.reporting.markup import clean

    table = _table("layer", "channels", "left", "removed")
    for change in pruned.record.layers:
        gone = f"{1 - change.after / change.before:.0%}" if change.after < change.before else ""
        table.add_row(Text(clean(change.layer)), str(change.before), str(change.after), gone)
    return table


def _table(first: str, *numbers: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _spared(pruned: "PrunedModel") -> dict[str, list[str]]:
    """Layers that kept their width, by the reason."""
    found: dict[str, list[str]] = {}
    for spared in pruned.record.spared:
        found.setdefault(spared.reason, []).append(spared.layer)
    return found


def _say(text: str) -> None:
    click.echo(text, err=True)


def _nothing(text: str) -> None:
    """Says nothing."""
