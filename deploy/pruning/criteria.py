"""How much a channel matters: free functions from tensors to one score for each unit, low goes first.

`rows` are the weights that make the units' channels, one row a unit: shape (units, weights).
"""

import torch
from torch import Tensor


def l1_norm(rows: Tensor) -> Tensor:
    """Sum of absolute weights of each filter (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""
    return rows.abs().sum(dim=1)


def l2_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each filter (the L2 variant that Li et al. 2017 compare with)."""
    return rows.square().sum(dim=1).sqrt()


def batch_norm_gamma(gammas: Tensor) -> Tensor:
    """Absolute batch-norm scale, summed over coupled layers (Liu et al. 2017, "Network Slimming").

    `gammas`: (units, norms).
    """
    return gammas.abs().sum(dim=1)


def taylor(values: Tensor, gradients: Tensor) -> Tensor:
    """Squared first-order change of the loss when a unit's parameters go to zero.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 for a group:
    the square of the sum of gradient times parameter. Both arguments are (units, parameters).
    """
    return (values * gradients).sum(dim=1).square()


def geometric_median_distance(rows: Tensor) -> Tensor:
    """Summed distance to all other filters (He et al. 2019, FPGM): the most replaceable have the least."""
    return torch.cdist(rows, rows).sum(dim=1)


def path_norm(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Norm of the weights that make a unit times the norm of those that read it: this tool's "auto".

    Data-free: it bounds what the unit can contribute to the next layer. `columns`: (units, weights), or
    None where nothing with weights reads the unit.
    """
    made = l2_norm(rows)
    return made if columns is None else made * l2_norm(columns)


def random_scores(units: int, generator: torch.Generator) -> Tensor:
    """The control: uniform scores."""
    return torch.rand(units, generator=generator)


def relative(scores: Tensor) -> Tensor:
    """Scores over their mean, so that layers of different size and scale can be ranked together."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores
