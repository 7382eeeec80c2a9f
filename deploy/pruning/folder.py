"""A pruned model as a folder that loads without this tool: model.safetensors, load.py, pruning.json.

A training checkpoint adds checkpoint.pt. The folder appears whole or not at all.
"""

import contextlib
import importlib
import importlib.resources
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deploy.cache import file_digest
from deploy.disk import disk_error
from deploy.environment import environment
from deploy.manifest import Environment, File, LayerWidths, Value, encode
from deploy.planner import METHODS as METHODS_BY_PATTERN
from deploy.pruning import METHODS, standalone
from deploy.pruning.channels import ChannelPruning, Criterion, Loss
from deploy.pruning.checkpoint import prune_checkpoint
from deploy.pruning.delta import ArchitectureDelta, copy_module, load_pruned, save_pruned
from deploy.weights import assign, find_state
from targets.errors import IntegrityError, MissingRequirementError, UsageError, nearest

SCHEMA_VERSION = "1.0"
WEIGHTS = standalone.WEIGHTS
CHECKPOINT = "checkpoint.pt"
RECORD = "pruning.json"
LOADER = "load.py"
ROLES = {WEIGHTS: "weights", CHECKPOINT: "checkpoint", LOADER: "loader"}
OWN_NAMES = {*ROLES, RECORD, "__pycache__"}  # Python leaves the last where load.py was imported
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names
DEEPEST = 4  # how far inside a checkpoint optimizers and averages are looked for

METHOD_NAMES = METHODS_BY_PATTERN["structured"]


class Spared(Value, frozen=True, kw_only=True):
    """A layer that kept its width, and why."""

    layer: str
    reason: str


class Costs(Value, frozen=True, kw_only=True):
    """Parameters, and multiply-accumulates of one sample."""

    parameters: int
    macs: int


class Origin(Value, frozen=True, kw_only=True):
    """What was pruned, with its hashes; null where there was no such file."""

    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    factory: str | None = None
    code_sha256: str | None = None
    config_sha256: str | None = None
    example_inputs: str | None = None
    target: str | None = None
    runtime: str | None = None


class PruningRecord(Value, frozen=True, kw_only=True):
    """pruning.json: what was asked for, what was done, and what it was done to.

    `asked` and `achieved` are fractions of `of` that went; `note` says why they differ.
    """

    schema_version: str = SCHEMA_VERSION
    model: str
    created_at: str
    method: str
    criterion: str
    ranking: str
    of: str
    asked: float
    achieved: float
    note: str
    min_channels: int
    channel_multiple: int
    exclude: list[str]
    seed: int
    before: Costs
    after: Costs
    layers: list[LayerWidths]
    spared: list[Spared]
    files: list[File]
    origin: Origin
    environment: Environment


class _Versioned(msgspec.Struct):
    schema_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedModel:
    """A pruned module, its training checkpoint, the record, and the folder; None for what was not asked."""

    module: nn.Module = field(repr=False)
    delta: ArchitectureDelta = field(repr=False)
    checkpoint: Mapping[str, Any] | None = field(repr=False)
    record: PruningRecord
    folder: Path | None


def prune(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    sparsity: float,
    of: Literal["macs", "parameters"] = "macs",
    method: str = "auto",
    criterion: Criterion = "auto",
    ranking: Literal["global", "local"] = "global",
    min_channels: int = 8,
    channel_multiple: int = 1,
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
    checkpoint: Mapping[str, Any] | None = None,
    parameter_order: Sequence[str] | None = None,
    output_dir: Path | None = None,
    force: bool = False,
    name: str | None = None,
    origin: Origin | None = None,
) -> PrunedModel:
    """A smaller copy of the module, and of its training checkpoint; the module itself is not touched.

    `checkpoint` is {model, optimizer, step, ...} as it was saved while this module was trained: weights,
    averages and optimizer state are sliced alike, `parameter_order` as in `prune_checkpoint`. With
    `output_dir` the result is written as a folder that load.py in it loads with torch and safetensors
    alone; `force` replaces a folder that was written so before. The other arguments are those of
    `prune_channels`. Raises UsageError for a request that cannot be met and for an output folder that
    holds something else, ModelError for a module that cannot be cut, MissingRequirementError where the
    folder cannot be written.
    """
    if output_dir is not None:
        check_output(output_dir, force=force)
    chosen = _known_method(method)
    result = _method(chosen)(
        module,
        example_inputs,
        sparsity=sparsity,
        of=of,
        criterion=criterion,
        ranking=ranking,
        min_channels=min_channels,
        channel_multiple=channel_multiple,
        exclude=exclude,
        loss=loss,
        seed=seed,
    )
    record = PruningRecord(
        model=name or type(module).__name__,
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        method=chosen,
        ranking=ranking,
        min_channels=min_channels,
        channel_multiple=channel_multiple,
        exclude=list(exclude),
        seed=seed,
        files=[],
        origin=origin or Origin(),
        environment=environment(),
        **_done(result),
    )
    pruned = PrunedModel(
        module=result.module,
        delta=result.delta,
        checkpoint=None if checkpoint is None else _smaller(checkpoint, module, result, parameter_order),
        record=record,
        folder=None,
    )
    return pruned if output_dir is None else write_folder(output_dir, pruned, module, force=force)


def check_output(folder: Path, *, force: bool) -> None:
    """Raises UsageError where the folder may not be written: a file, something else's, or not asked to."""
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UsageError(
                "the output folder cannot be made",
                found=f"{path} is a file",
                expected="a folder",
                fix="choose another -o",
            )
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strangers = sorted(held - OWN_NAMES)
    if held and (strangers or RECORD not in held):
        raise UsageError(
            f"{folder} holds files that deploy prune did not write",
            found=", ".join((strangers or sorted(held))[:5]),
            expected="a new folder, an empty one, or an earlier result of deploy prune",
            fix="choose another -o",
        )
    if held and not force:
        raise UsageError(
            f"{folder} holds an earlier result",
            found=RECORD,
            expected="a new folder",
            fix="choose another -o, or replace it with --force",
        )


def write_folder(folder: Path, pruned: PrunedModel, dense: nn.Module, *, force: bool) -> PrunedModel:
    """Writes the folder whole or not at all, and returns the result with its place and its files.

    What was written is loaded again from the dense module by the loader in it, and compared, before it
    takes its place.
    """
    check_output(folder, force=force)
    with _telling_disk_errors(folder), _appearing(folder, force=force) as scratch:
        save_pruned(pruned.module, pruned.delta, scratch / WEIGHTS)
        if pruned.checkpoint is not None:
            with (scratch / CHECKPOINT).open("wb") as stream:  # of a path torch does not say why it failed
                torch.save(dict(pruned.checkpoint), stream)
        loader = importlib.resources.files("deploy.pruning").joinpath("standalone.py")
        (scratch / LOADER).write_bytes(loader.read_bytes())
        _prove(scratch, pruned.module, dense)
        record = msgspec.structs.replace(pruned.record, files=_files(scratch))
        (scratch / RECORD).write_bytes(encode(record))
        mode = (scratch / RECORD).stat().st_mode  # safetensors makes its file for its owner alone
        for file in scratch.iterdir():
            file.chmod(mode)
            _flush(file)
    return PrunedModel(
        module=pruned.module, delta=pruned.delta, checkpoint=pruned.checkpoint, record=record, folder=folder
    )


def read_folder(folder: Path) -> PruningRecord:
    """The record of a folder whose files are what it says.

    Raises UsageError where there is none, IntegrityError where a file is damaged or the version unknown.
    """
    try:
        data = (folder / RECORD).read_bytes()
    except OSError as error:
        raise UsageError(
            f"no pruned model at {folder}",
            found=error.strerror,
            expected=f"a folder that holds {RECORD}",
            fix="name the folder that deploy prune wrote",
        ) from error
    record = _decode(data, folder)
    for file in record.files:
        found = folder / file.path
        if not found.is_file() or file_digest(found) != file.sha256:
            raise IntegrityError(
                f"{found} is not what {RECORD} says",
                found="another content" if found.is_file() else "no such file",
                expected=f"SHA-256 {file.sha256}",
                fix="prune again into this folder with --force",
            )
    return record


def load_folder(factory: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """The pruned model of a folder, its hashes checked; without this tool, load.py in it does the same."""
    read_folder(folder)
    return load_pruned(factory, folder / WEIGHTS)


def _known_method(name: str) -> str:
    if name in METHOD_NAMES:
        return METHOD_NAMES[name]
    known = tuple(METHOD_NAMES)
    raise UsageError(
        "the method is unknown",
        found=repr(name),
        expected=", ".join(known),
        fix=f"did you mean {nearest(name, known, 1)[0]!r}?",
    )


def _method(name: str) -> Callable[..., ChannelPruning]:
    module, _, attribute = METHODS[name].partition(":")
    method: Callable[..., ChannelPruning] = getattr(importlib.import_module(module), attribute)
    return method


def _done(result: ChannelPruning) -> dict[str, Any]:
    """What pruning says of itself, as fields of the record."""
    return {
        "criterion": result.criterion,
        "of": result.of,
        "asked": result.asked,
        "achieved": round(result.achieved, 4),
        "note": result.note,
        "before": Costs(parameters=result.before.parameters, macs=result.before.macs),
        "after": Costs(parameters=result.after.parameters, macs=result.after.macs),
        "layers": [
            LayerWidths(layer=change.layer, kind=change.kind, before=change.before, after=change.after)
            for change in result.layers
        ],
        "spared": [Spared(layer=layer, reason=reason) for layer, reason in result.spared.items()],
    }


def _smaller(
    checkpoint: Mapping[str, Any], dense: nn.Module, result: ChannelPruning, order: Sequence[str] | None
) -> dict[str, Any]:
    """The checkpoint of the pruned model, proven to load into it."""
    places = dict(_nested(checkpoint, ()))
    flat = {**checkpoint, **{f"\0{number}": value for number, value in enumerate(places.values())}}
    sliced = prune_checkpoint(flat, _with_aliases(result.delta, dense), parameter_order=order)
    smaller = {key: sliced[key] for key in checkpoint}
    for number, place in enumerate(places):
        smaller = _put(smaller, place, sliced[f"\0{number}"])
    state = find_state(smaller)
    if state is not None:
        assign(copy_module(result.module), without_prefix(state), origin="the pruned checkpoint")
    return smaller


def _nested(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """Optimizers and states that lie deeper than the top of a checkpoint: (where, what)."""
    if len(place) > DEEPEST:
        return
    is_end = isinstance(value, Mapping) and _is_tensors_or_optimizer(value)
    if is_end and len(place) > 1:
        yield place, value
    elif isinstance(value, Mapping) and not is_end:
        for key, inner in value.items():
            yield from _nested(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _nested(inner, (*place, index))


def _is_tensors_or_optimizer(value: Mapping[Any, Any]) -> bool:
    return {"state", "param_groups"} <= set(value) or any(isinstance(one, Tensor) for one in value.values())


def _put(value: Any, place: Sequence[Any], new: Any) -> Any:
    """A copy of nested values with one of them replaced."""
    if not place:
        return new
    key, *rest = place
    if isinstance(value, Mapping):
        return {**value, key: _put(value[key], rest, new)}
    changed = list(value)
    changed[key] = _put(changed[key], rest, new)
    return tuple(changed) if isinstance(value, tuple) else changed


def _with_aliases(delta: ArchitectureDelta, dense: nn.Module) -> ArchitectureDelta:
    """The delta with an entry for every name of a tensor: a state dict lists shared ones by all of them."""
    own = dense.state_dict(keep_vars=True)
    changes = {id(own[name]): change for name, change in delta.tensors.items() if name in own}
    names = {name: changes[id(tensor)] for name, tensor in own.items() if id(tensor) in changes}
    return msgspec.structs.replace(delta, tensors={**delta.tensors, **names})


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what DataParallel or torch.compile put before every name."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def _prove(folder: Path, pruned: nn.Module, dense: nn.Module) -> None:
    """Raises AssertionError where the loader gives another module: a bug, never a user's mistake."""
    loaded = standalone.load(lambda: dense, folder).state_dict()
    expected = pruned.state_dict()
    if loaded.keys() != expected.keys() or any(
        not torch.equal(loaded[name].cpu(), tensor.cpu()) for name, tensor in expected.items()
    ):
        raise AssertionError("the folder's loader does not give back the pruned model")


def _files(folder: Path) -> list[File]:
    return [
        File(
            path=name,
            role=role,
            size_bytes=(folder / name).stat().st_size,
            sha256=file_digest(folder / name),
        )
        for name, role in ROLES.items()
        if (folder / name).exists()
    ]


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _appearing(folder: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when the block ends and vanishes when it fails."""
    folder = Path(os.path.realpath(folder))
    missing = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".deploy-prune-", dir=folder.parent, ignore_cleanup_errors=True
        ) as private:
            new = Path(private) / "new"
            new.mkdir()
            yield new
            check_output(folder, force=force)  # it may have come into being meanwhile
            _swap(new, folder, aside=Path(private) / "old")
    except BaseException:
        for empty in missing:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def _swap(new: Path, folder: Path, *, aside: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


@contextlib.contextmanager
def _telling_disk_errors(folder: Path) -> Iterator[None]:
    """A full disk as the error it is: torch and safetensors wrap it in exceptions of their own."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, folder) from error
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, OSError):
            raise disk_error(error.__context__, folder) from error
        if not isinstance(error, SafetensorError) and "inline_container" not in str(error):
            raise
        raise MissingRequirementError(
            f"cannot write to {folder}",
            found=str(error).splitlines()[0],
            expected="a folder with room that may be written to",
            fix="free space, or choose another -o",
        ) from error


def _decode(data: bytes, folder: Path) -> PruningRecord:
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise IntegrityError(
                f"{folder / RECORD} has an unknown schema version",
                found=version,
                expected=f"{SCHEMA_VERSION.split('.')[0]}.x",
                fix="use the edge-deploy version that wrote it, or prune again",
            )
        return msgspec.json.decode(data, type=PruningRecord)
    except msgspec.DecodeError as error:
        raise IntegrityError(
            f"{folder / RECORD} is damaged: {error}", fix="prune again into this folder with --force"
        ) from error
