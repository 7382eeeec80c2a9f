"""What recovery minimises: free functions on tensors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

IGNORED_LABEL = -100
_SMALLEST = 1e-12


def floating_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output in order: tensor, tuple, dict or dataclass."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += floating_leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def logits_of(leaves: Sequence[Tensor]) -> Tensor | None:
    """The first leaf with at least two axes, taken to be the logits; None where there is none."""
    return next((leaf for leaf in leaves if leaf.ndim >= 2), None)


def class_axis(logits_shape: Sequence[int], labels_shape: Sequence[int]) -> int | None:
    """The axis of the logits over which classes run, None where the labels do not fit.

    Labels have the shape of the logits without that axis: the last (classification, (n, tokens,
    classes)) or else axis 1 (segmentation, (n, classes, height, width)).
    """
    for axis in (len(logits_shape) - 1, 1):
        if tuple(labels_shape) == (*logits_shape[:axis], *logits_shape[axis + 1 :]):
            return axis
    return None


def are_probabilities(values: Tensor, axis: int) -> bool:
    """Whether every entry lies in 0..1 and sums over the axis are 1: the model ends in a softmax."""
    within = bool((values >= 0).all()) and bool((values <= 1).all())
    return within and bool(((values.sum(axis) - 1).abs() < 1e-3).all())


def log_of(probabilities: Tensor) -> Tensor:
    """Probabilities as logits: softmax of their logarithm gives them back."""
    return probabilities.clamp_min(_SMALLEST).log()


def distillation_kl(student: Tensor, teacher: Tensor, *, temperature: float, axis: int = -1) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all positions.

    The factor T^2 keeps the gradients' size independent of the temperature. Hinton, Vinyals and Dean
    2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    wanted = functional.log_softmax(teacher / temperature, axis)
    given = functional.log_softmax(student / temperature, axis)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(axis).mean()


def label_cross_entropy(logits: Tensor, labels: Tensor, *, axis: int = -1) -> Tensor:
    """Cross-entropy with integer class labels; positions labelled -100 do not count."""
    if not bool((labels != IGNORED_LABEL).any()):
        return logits.sum() * 0.0
    return functional.cross_entropy(logits.movedim(axis, 1), labels, ignore_index=IGNORED_LABEL)


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error divided by the mean square of the teacher's values, which makes it unitless."""
    return functional.mse_loss(student, teacher) / teacher.square().mean().clamp_min(_SMALLEST)


def feature_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean of `relative_mse` over pairs of equal shape (hints, Romero et al. 2015, "FitNets").

    Zero for no pairs.
    """
    if not student:
        return torch.zeros(())
    return torch.stack([relative_mse(a, b) for a, b in zip(student, teacher, strict=True)]).mean()
