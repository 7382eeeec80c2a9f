"""Which channels go: the nearest selection to what was asked that is proven right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deploy.pruning import layers, proof
from deploy.pruning.cost import count_macs
from deploy.pruning.delta import ArchitectureDelta, TensorDelta
from deploy.pruning.graph import Cell, Slot, removed_indices
from deploy.pruning.selection import Candidates, Selection, select
from targets.errors import ModelError, UsageError

FAR = 0.10  # a miss beyond this is refused; one beyond selection.TOLERANCE is explained


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `prune_channels` was asked for."""

    sparsity: float
    of: str
    criterion: str
    ranking: str
    min_channels: int
    channel_multiple: int
    seed: int


def plan_removal(
    work: nn.Module,
    inputs: tuple[Tensor, ...],
    scored: Sequence[tuple[Cell, Tensor]],
    request: Request,
    spared: Mapping[str, str],
) -> tuple[ArchitectureDelta, Selection, dict[str, str]]:
    """The proven delta whose cost is nearest to the asked one; its selection; what was refuted."""
    shapes, weights = _cost_model(work, inputs, request.of)
    witness = proof.witness(work, inputs, seed=request.seed)
    refuted: dict[str, str] = {}
    while True:  # each round drops at least one cell
        selection = _select(scored, shapes, weights, work, request)
        if not any(selection.counts) or abs(selection.achieved - request.sparsity) > FAR:
            raise _unreachable(selection, request, spared, refuted)
        chosen = [
            _lowest(cell, scores, count)
            for (cell, scores), count in zip(scored, selection.counts, strict=True)
        ]
        delta = _delta(work, [unit for units in chosen for unit in units])
        reason = proof.refute(witness, delta, inputs)
        if reason is None:
            return delta, selection, refuted
        guilty = _guilty(work, witness, inputs, chosen)
        guilty = guilty or {index: reason for index, units in enumerate(chosen) if units}
        for index, why in guilty.items():
            refuted.update((path, why) for path in scored[index][0].outputs)
        scored = [one for index, one in enumerate(scored) if index not in guilty]


def _lowest(cell: Cell, scores: Tensor, count: int) -> list[Mapping[Slot, tuple[int, ...]]]:
    return [cell.units[index] for index in scores.argsort(stable=True)[:count].tolist()]


def _select(
    scored: Sequence[tuple[Cell, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, float],
    work: nn.Module,
    request: Request,
) -> Selection:
    return select(
        [
            Candidates(scores=tuple(scores.tolist()), rates=cell.rates, outputs=cell.outputs)
            for cell, scores in scored
        ],
        widths={path: layers.width(part) for path, part in work.named_modules() if layers.is_weighted(part)},
        shapes=shapes,
        weights=weights,
        asked=request.sparsity,
        ranking=request.ranking,
        min_channels=request.min_channels,
        channel_multiple=request.channel_multiple,
    )


def _cost_model(
    work: nn.Module, inputs: tuple[Tensor, ...], of: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Every tensor's shape, and the cost of one element of it.

    A layer's multiply-accumulates are in proportion to the elements of its weight. What is computed
    outside of layers is a constant under the name "".
    """
    tensors = dict([*work.named_parameters(), *work.named_buffers()])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if of == "parameters":
        return shapes, dict.fromkeys((name for name, _ in work.named_parameters()), 1.0)
    total, by_path = count_macs(work, inputs)
    weights: dict[str, float] = {}
    for path, part in work.named_modules():
        name = f"{path}.weight" if path else "weight"
        if layers.is_weighted(part) and name in tensors:
            weights[name] = by_path.get(path, 0) / tensors[name].numel()
            total -= by_path.get(path, 0)
    return shapes | {"": (1,)}, weights | {"": float(total)}


def _delta(work: nn.Module, units: Sequence[Mapping[Slot, tuple[int, ...]]]) -> ArchitectureDelta:
    removed, attributes = removed_indices(units, dict(work.named_modules()))
    tensors = dict([*work.named_parameters(), *work.named_buffers()])
    changes: dict[str, TensorDelta] = {}
    for name in dict.fromkeys(name for name, _ in removed):
        before = tuple(tensors[name].shape)
        kept = {
            dim: tuple(sorted(set(range(before[dim])) - set(removed[name, dim])))
            for dim in range(len(before))
            if (name, dim) in removed
        }
        after = tuple(len(kept.get(dim, range(size))) for dim, size in enumerate(before))
        changes[name] = TensorDelta(before=before, after=after, kept=kept)
    parameters = tuple(name for name, _ in work.named_parameters())
    return ArchitectureDelta(attributes=attributes, tensors=changes, parameters=parameters)


def _guilty(
    work: nn.Module,
    witness: nn.Module,
    inputs: tuple[Tensor, ...],
    chosen: Sequence[Sequence[Mapping[Slot, tuple[int, ...]]]],
) -> dict[int, str]:
    """Cells that are refuted when they alone are cut."""
    found: dict[int, str] = {}
    for index, units in enumerate(chosen):
        reason = proof.refute(witness, _delta(work, units), inputs) if units else None
        if reason is not None:
            found[index] = reason
    return found


def _unreachable(
    selection: Selection, request: Request, spared: Mapping[str, str], refuted: Mapping[str, str]
) -> UsageError | ModelError:
    limits = f"channel_multiple {request.channel_multiple} and min_channels {request.min_channels}"
    if refuted:
        return ModelError(
            f"{request.sparsity:.0%} of the {_noun(request.of)} cannot be removed: {_listed(refuted)}",
            found=f"at most {selection.reachable:.1%} in the other layers",
            expected="a forward that reads its widths from the tensors and keeps channels apart",
            fix="write x.flatten(1) or x.view(x.shape[0], -1) instead of fixed numbers, or ask for less",
        )
    if selection.reachable == 0.0:
        return UsageError(
            f"no channel can be removed at {limits}",
            found=_listed(spared) if spared else "no layer with channels to spare",
            expected="at least one inner layer wider than the multiple and the minimum",
            fix="lower channel_multiple or min_channels, or exclude less",
        )
    return UsageError(
        f"{request.sparsity:.1%} of the {_noun(request.of)} cannot be removed at {limits}",
        found=f"the nearest is {selection.achieved:.1%}, the most {selection.reachable:.1%}",
        expected="a sparsity within 10 points of what the steps allow",
        fix="ask for what is reachable, lower channel_multiple or min_channels, or exclude less",
    )


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{path}: {reason}" for path, reason in list(reasons.items())[:4]]
    return "; ".join(shown) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")


def _noun(of: str) -> str:
    return "multiply-accumulates" if of == "macs" else "parameters"
