"""Scores of a model's units by criterion: gathers the tensors that `criteria` judges."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from deploy.pruning import criteria, layers
from deploy.pruning.delta import copy_module
from deploy.pruning.graph import BOTH, IN, OUT, Cell
from targets.errors import ModelError, UsageError

NO_NORM_REASON = "no batch-norm follows it, and the criterion reads batch-norm's gamma"


def unit_scores(cell: Cell, criterion: str, modules: Mapping[str, nn.Module], seed: int) -> Tensor | None:
    """One score for each unit of the cell, low goes first; None where the criterion cannot judge it.

    "taylor" is not here: it needs gradients, see `taylor_scores`.
    """
    if criterion == "random":
        return criteria.random_scores(len(cell.units), torch.Generator().manual_seed(seed))
    if criterion == "bn":
        gammas = _gather(cell, modules, _gamma)
        return None if gammas is None else criteria.batch_norm_gamma(gammas)
    rows = _gather(cell, modules, _filters)
    if rows is None:
        return None
    if criterion == "auto":
        return criteria.relative(criteria.path_norm(rows, _gather(cell, modules, _columns, (IN,))))
    score = {"l1": criteria.l1_norm, "l2": criteria.l2_norm, "median": criteria.geometric_median_distance}
    return criteria.relative(score[criterion](rows))


def taylor_scores(
    module: nn.Module,
    cells: Iterable[Cell],
    loss: Callable[[nn.Module], Tensor | Iterable[Tensor]],
) -> list[Tensor]:
    """Squared first-order changes of the loss, summed over the losses that `loss` gives.

    Raises UsageError where a loss is no differentiable scalar or is not finite.
    """
    work = copy_module(module).eval().requires_grad_(True)
    modules = dict(work.named_modules())
    cells = list(cells)
    totals = [torch.zeros(len(cell.units)) for cell in cells]
    for value in _losses(loss, work):
        work.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        for index, cell in enumerate(cells):
            totals[index] += _taylor(cell, modules)
    return totals


def _losses(loss: Callable[[nn.Module], Tensor | Iterable[Tensor]], work: nn.Module) -> Iterable[Tensor]:
    answer = loss(work)
    count = 0
    for value in [answer] if isinstance(answer, Tensor) else answer:
        count += 1
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise UsageError(
                "the loss for the Taylor criterion cannot be differentiated",
                found=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                expected="a scalar tensor computed from the module's outputs with gradients on",
                fix="compute the loss outside torch.no_grad and without .item() or .detach()",
            )
        if not torch.isfinite(value):
            raise UsageError(
                "the loss for the Taylor criterion is not finite",
                found=value.item(),
                expected="a finite number",
                fix="check the calibration data and labels for NaN",
            )
        yield value
    if count == 0:
        raise UsageError(
            "the loss for the Taylor criterion gave nothing",
            found="no losses",
            expected="one scalar, or one for each calibration batch",
            fix="give it calibration data",
        )


def _taylor(cell: Cell, modules: Mapping[str, nn.Module]) -> Tensor:
    values, gradients = _gather(cell, modules, _affine), _gather(cell, modules, _affine_gradient)
    if values is None or gradients is None:  # no norm follows: the filters and biases are the gate
        values = _gather(cell, modules, _filters_and_bias)
        gradients = _gather(cell, modules, _filters_and_bias_gradient)
    if values is None or gradients is None:
        raise ModelError(
            f"the loss does not reach {cell.name}",
            expected="gradients for every layer that may be pruned",
            fix="exclude the layer, or use another criterion",
        )
    return criteria.taylor(values, gradients).cpu().float()


def _gather(
    cell: Cell,
    modules: Mapping[str, nn.Module],
    read: Callable[[nn.Module], Tensor | None],
    sides: tuple[str, ...] = (OUT, BOTH),
) -> Tensor | None:
    """(units, values) from every coupled layer that `read` can read; it gives (channels, values)."""
    parts = []
    for slot in cell.units[0]:
        part = modules.get(slot.path)
        tensor = read(part) if part is not None and slot.side in sides else None
        if tensor is not None:
            indices = torch.tensor([unit[slot] for unit in cell.units], device=tensor.device)
            parts.append(tensor[indices].reshape(len(cell.units), -1))
    return torch.cat(parts, dim=1) if parts else None


def _filters(part: nn.Module) -> Tensor | None:
    return _rows(part, _tensor(part, "weight")) if layers.is_weighted(part) else None


def _columns(part: nn.Module) -> Tensor | None:
    return _consumed(part, _tensor(part, "weight")) if layers.is_weighted(part) else None


def _filters_and_bias(part: nn.Module) -> Tensor | None:
    if not layers.is_weighted(part):
        return None
    return _with_bias(part, _tensor(part, "weight"), _tensor(part, "bias"))


def _filters_and_bias_gradient(part: nn.Module) -> Tensor | None:
    if not layers.is_weighted(part):
        return None
    return _with_bias(part, _gradient(part, "weight"), _gradient(part, "bias"))


def _with_bias(part: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    rows = _rows(part, weight)
    return rows if rows is None or bias is None else torch.cat([rows, bias[:, None]], dim=1)


def _rows(part: nn.Module, weight: Tensor | None) -> Tensor | None:
    """(output channels, weights of its filter), whichever way the layer stores them."""
    if weight is None or not isinstance(part, _ConvTransposeNd):
        return None if weight is None else weight.reshape(weight.shape[0], -1)
    by_group = weight.reshape(
        part.groups, part.in_channels // part.groups, part.out_channels // part.groups, -1
    )
    return by_group.transpose(1, 2).reshape(part.out_channels, -1)


def _consumed(part: nn.Module, weight: Tensor | None) -> Tensor | None:
    """(input channels, weights that read it), whichever way the layer stores them."""
    if weight is None or isinstance(part, _ConvTransposeNd):
        return None if weight is None else weight.reshape(weight.shape[0], -1)
    groups = part.groups if isinstance(part, _ConvNd) else 1
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return by_group.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _gamma(part: nn.Module) -> Tensor | None:
    gamma = _tensor(part, "weight") if isinstance(part, _BatchNorm) else None
    return None if gamma is None else gamma[:, None]


def _affine(part: nn.Module) -> Tensor | None:
    if not layers.is_channelwise_norm(part):
        return None
    return _paired(_tensor(part, "weight"), _tensor(part, "bias"))


def _affine_gradient(part: nn.Module) -> Tensor | None:
    if not layers.is_channelwise_norm(part):
        return None
    return _paired(_gradient(part, "weight"), _gradient(part, "bias"))


def _paired(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return None if weight is None or bias is None else torch.stack([weight, bias], dim=1)


def _tensor(part: nn.Module, name: str) -> Tensor | None:
    parameter = getattr(part, name, None)
    return parameter.detach().float() if isinstance(parameter, Tensor) else None


def _gradient(part: nn.Module, name: str) -> Tensor | None:
    parameter = getattr(part, name, None)
    gradient = parameter.grad if isinstance(parameter, Tensor) else None
    return None if gradient is None else gradient.float()
