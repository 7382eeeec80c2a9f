"""Structured pruning of whole channels: the smaller network is an ordinary dense one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from deploy.modes import evaluating
from deploy.pruning import layers, scoring
from deploy.pruning.cost import Cost, count_cost
from deploy.pruning.delta import ArchitectureDelta, apply_delta, copy_module
from deploy.pruning.forward import ForwardError, forward_outputs
from deploy.pruning.graph import Cell, find_channels
from deploy.pruning.naming import matching
from deploy.pruning.planning import Request, plan_removal
from deploy.pruning.selection import TOLERANCE, Selection
from targets.errors import ModelError, UsageError, nearest

Criterion = Literal["auto", "l1", "l2", "bn", "taylor", "median", "random"]
Loss = Callable[[nn.Module], Tensor | Iterable[Tensor]]

CRITERIA = ("auto", "l1", "l2", "bn", "taylor", "median", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """Output channels of a layer before and after."""

    layer: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPruning:
    """A pruned copy of a module and what was done.

    `asked` and `achieved` are fractions of `of` ("macs" or "parameters") removed; `note` says why they
    differ by more than 2 points. `spared` maps layers
    that kept their width to the reason. `delta` rebuilds the architecture.
    """

    module: nn.Module
    before: Cost
    after: Cost
    asked: float
    achieved: float
    of: str
    criterion: str
    layers: tuple[LayerChange, ...]
    spared: Mapping[str, str] = field(default_factory=dict)
    delta: ArchitectureDelta
    note: str = ""


def prune_channels(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    sparsity: float,
    of: Literal["macs", "parameters"] = "macs",
    criterion: Criterion = "auto",
    ranking: Literal["global", "local"] = "global",
    min_channels: int = 8,
    channel_multiple: int = 1,
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> ChannelPruning:
    """A copy of the module without its least important channels; the module itself is not touched.

    `sparsity` is the fraction of multiply-accumulates (or parameters) to remove. What stays of each
    layer is a multiple of `channel_multiple` and at least `min_channels`; the first layer, the output
    layers and layers whose path matches a pattern of `exclude` keep their width. `loss` gives the loss
    on calibration data, one scalar or one for each batch; criterion "taylor" needs it.

    The result is proven on the example inputs: see `deploy.pruning.proof`. Raises UsageError for a
    request that cannot be met, ModelError for a module that cannot be traced or cut.
    """
    request = Request(
        sparsity=sparsity,
        of=of,
        criterion=criterion,
        ranking=ranking,
        min_channels=min_channels,
        channel_multiple=channel_multiple,
        seed=seed,
    )
    _check(request, loss)
    with torch.inference_mode(False), torch.enable_grad():
        inputs = tuple(tensor.detach().clone() for tensor in example_inputs)
        work, work_inputs = _working_copy(module, inputs)
        channels = find_channels(work, work_inputs, excluded=matching(module, exclude))
        cells, unscored = _scored(module, channels.cells, request, loss)
        spared = {**channels.spared, **unscored}
        delta, selection, refuted = plan_removal(work, work_inputs, cells, request, spared)
        pruned = apply_delta(module, delta)
        _run_once(pruned, inputs)
        # Both in the working precision: a float32 kernel may hide what it computes from the counter.
        costs = count_cost(work, work_inputs), count_cost(apply_delta(work, delta), work_inputs)
        changes = _changes(module, pruned)
        return _result(pruned, costs, changes, (delta, selection), request, {**spared, **refuted})


def _check(request: Request, loss: Loss | None) -> None:
    if not 0.0 < request.sparsity < 1.0:
        raise UsageError(
            "the sparsity is out of range",
            found=request.sparsity,
            expected="a number between 0 and 1, both excluded",
            fix="for example sparsity = 0.4; leave pruning out to remove nothing",
        )
    for name, value, known in (
        ("criterion", request.criterion, CRITERIA),
        ("ranking", request.ranking, ("global", "local")),
        ("of", request.of, ("macs", "parameters")),
    ):
        if value not in known:
            raise UsageError(
                f"unknown {name}",
                found=value,
                expected=", ".join(known),
                fix=f"did you mean {nearest(value, known)[0]}?",
            )
    for name, number in (
        ("min_channels", request.min_channels),
        ("channel_multiple", request.channel_multiple),
    ):
        if number < 1:
            raise UsageError(
                f"{name} is out of range", found=number, expected="at least 1", fix=f"set {name} = 1"
            )
    if request.criterion == "taylor" and loss is None:
        raise UsageError(
            "the Taylor criterion needs a loss",
            found="none",
            expected="loss=: a function from the module to the loss on calibration data",
            fix='give labelled calibration data, or use criterion = "l2"',
        )


def _working_copy(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy in double precision and evaluation mode; in float32 where the model fixes its dtype."""
    for dtype in (torch.float64, torch.float32):
        work = copy_module(module).to(device="cpu", dtype=dtype).eval()
        cast = tuple(
            tensor.to(device="cpu", dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            for tensor in inputs
        )
        try:
            with torch.no_grad():
                forward_outputs(work, cast)
        except ForwardError as error:
            failure = error
            continue
        return work, cast
    raise ModelError(
        f"the forward pass fails in {failure.where} at {failure.line}",
        found=str(failure.cause).strip().split("\n")[0],
        expected="a module that runs on the example inputs",
        fix="check the inputs' shapes and dtypes",
    ) from failure.cause


def _run_once(pruned: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The forward pass in the module's own precision; what was proven in the working one must run here."""
    try:
        with evaluating(pruned), torch.no_grad():
            forward_outputs(pruned, tuple(tensor.clone() for tensor in inputs))
    except ForwardError as error:
        raise ModelError(
            f"the pruned model fails in {error.where} at {error.line}",
            found=str(error.cause).strip().split("\n")[0],
            expected="a forward pass in the module's own dtype and on its device",
            fix="pass example inputs of that dtype and device",
        ) from error.cause


def _scored(
    module: nn.Module, cells: Sequence[Cell], request: Request, loss: Loss | None
) -> tuple[list[tuple[Cell, Tensor]], dict[str, str]]:
    """Cells with their units' scores, and layers that the criterion cannot judge."""
    _check_weights(module)
    if request.criterion == "taylor" and loss is not None:
        return list(zip(cells, scoring.taylor_scores(module, cells, loss), strict=True)), {}
    modules = dict(module.named_modules())
    scored: list[tuple[Cell, Tensor]] = []
    unscored: dict[str, str] = {}
    for index, cell in enumerate(cells):
        scores = scoring.unit_scores(cell, request.criterion, modules, request.seed + index)
        if scores is None:
            unscored.update((path, scoring.NO_NORM_REASON) for path in cell.outputs)
        else:
            scored.append((cell, scores.cpu()))
    return scored, unscored


def _check_weights(module: nn.Module) -> None:
    bad = [
        name for name, parameter in module.named_parameters() if not torch.isfinite(parameter.detach()).all()
    ]
    if bad:
        raise ModelError(
            f"the weights of {type(module).__name__} are not finite",
            found=f"NaN or infinity in {', '.join(bad[:5])}",
            expected="finite numbers, which can be ranked",
            fix="load the weights again, or train without the step that broke them",
        )


def _result(
    pruned: nn.Module,
    costs: tuple[Cost, Cost],
    changes: tuple[LayerChange, ...],
    planned: tuple[ArchitectureDelta, Selection],
    request: Request,
    spared: Mapping[str, str],
) -> ChannelPruning:
    before, after = costs
    achieved = 1.0 - getattr(after, request.of) / getattr(before, request.of)
    narrowed = {change.layer for change in changes if change.after < change.before}
    return ChannelPruning(
        module=pruned,
        before=before,
        after=after,
        asked=request.sparsity,
        achieved=achieved,
        of=request.of,
        criterion=request.criterion,
        layers=changes,
        spared={path: reason for path, reason in spared.items() if path not in narrowed},
        delta=planned[0],
        note=_note(achieved, planned[1], request),
    )


def _changes(module: nn.Module, pruned: nn.Module) -> tuple[LayerChange, ...]:
    smaller = dict(pruned.named_modules())
    return tuple(
        LayerChange(
            layer=path, kind=type(part).__name__, before=layers.width(part), after=layers.width(smaller[path])
        )
        for path, part in module.named_modules()
        if layers.is_weighted(part)
    )


def _note(achieved: float, selection: Selection, request: Request) -> str:
    if abs(achieved - request.sparsity) <= TOLERANCE:
        return ""
    limits = f"channel multiple {request.channel_multiple} and min_channels {request.min_channels}"
    most = selection.reachable < request.sparsity
    reason = "the most that" if most else "the nearest found in the steps that"
    return f"asked {request.sparsity:.1%}, achieved {achieved:.1%}: {reason} {limits} allow"
