"""Which losses apply to a model and its training data, and how well it does on held-out samples."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploy.recovery import losses
from targets.errors import ModelError, UsageError

TEMPERATURE = 4.0
TEACHER_SHARE = 0.9
FEATURE_WEIGHT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The loss for one kind of data, decided once from a first answer of student and teacher.

    With integer labels: (1 - a) cross-entropy + a KL to the teacher, a = TEACHER_SHARE, or
    cross-entropy alone without a teacher. With float labels and without labels: relative mean squared
    error to the labels, to the teacher's outputs, or the mean of both.
    `axis` is the class axis, None for values. `student_softmax` and `teacher_softmax` say that the
    outputs are probabilities already.
    """

    axis: int | None
    student_softmax: bool = False
    teacher_softmax: bool = False

    def loss(self, student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
        """A scalar to minimise; `student` and `teacher` (None without one) are whole model outputs."""
        parts = self._class_losses if self.axis is not None else self._value_losses
        own, taught = parts(student, teacher, labels)
        if own is None or taught is None:
            return _given(own if taught is None else taught)
        return (1 - TEACHER_SHARE) * own + TEACHER_SHARE * taught

    def tally(self, student: Any, teacher: Any, labels: Tensor | None) -> tuple[float, float]:
        """Two sums over a batch for `score`: right and counted labels, or signal and noise power."""
        if self.axis is not None and labels is not None:
            counted = labels != losses.IGNORED_LABEL
            right = (_logits(student).argmax(self.axis) == labels) & counted
            return float(right.sum()), float(counted.sum())
        given, wanted = _value_pairs(student, teacher, labels)[0]
        wanted = wanted.double()
        return float(wanted.square().sum()), float((given.double() - wanted).square().sum())

    def score(self, first: float, second: float) -> float:
        """Accuracy, or the signal-to-noise ratio in dB of the outputs; more is better."""
        if self.axis is not None:
            return first / second if second else 0.0
        if first <= 0 or not math.isfinite(second):
            return -200.0
        return min(200.0, 10 * math.log10(first / max(second, first * 1e-20)))

    def _class_losses(
        self, student: Any, teacher: Any, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        axis = -1 if self.axis is None else self.axis
        logits = losses.log_of(_logits(student)) if self.student_softmax else _logits(student)
        own = None if labels is None else losses.label_cross_entropy(logits, labels, axis=axis)
        if teacher is None:
            return own, None
        wanted = losses.log_of(_logits(teacher)) if self.teacher_softmax else _logits(teacher)
        return own, losses.distillation_kl(logits, wanted, temperature=TEMPERATURE, axis=axis)

    def _value_losses(
        self, student: Any, teacher: Any, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        own = taught = None
        if labels is not None:
            given, wanted = _value_pairs(student, None, labels)[0]
            own = losses.relative_mse(given, wanted)
        if teacher is not None:
            given_all, wanted_all = zip(*_value_pairs(student, teacher, None), strict=True)
            taught = losses.feature_mse(given_all, wanted_all)
        return own, taught


def decide(student: Any, teacher: Any, labels: Tensor | None) -> Objective:
    """The objective that fits these outputs (`teacher` None without one) and labels.

    Raises UsageError where there is nothing to learn from or where labels or teacher do not fit, and
    ModelError where the outputs hold no floating-point tensor.
    """
    leaves = losses.floating_leaves(student)
    if not leaves:
        raise ModelError("recovery needs a model with a floating-point output")
    if labels is None and teacher is None:
        raise UsageError(
            "recovery has nothing to learn from",
            found="neither labels nor a dense model",
            expected="at least one of them",
            fix="add an array named label to the data of [recover]",
        )
    if labels is None or labels.is_floating_point():
        _value_pairs(student, teacher, labels)
        return Objective(axis=None)
    return _for_classes(student, teacher, labels)


def _for_classes(student: Any, teacher: Any, labels: Tensor) -> Objective:
    logits = _logits(student)
    axis = losses.class_axis(logits.shape, labels.shape)
    if axis is None or logits.shape[axis] < 2:
        raise UsageError(
            "labels do not fit the model's output",
            found=f"integer labels {tuple(labels.shape)} for an output {tuple(logits.shape)}",
            expected="the output's shape without its class axis (the last, or axis 1), two classes or more",
        )
    if teacher is None:
        return Objective(axis=axis, student_softmax=losses.are_probabilities(logits, axis))
    wanted = _logits(teacher)
    if wanted.shape != logits.shape:
        raise _shape_error(tuple(wanted.shape), tuple(logits.shape))
    return Objective(
        axis=axis,
        student_softmax=losses.are_probabilities(logits, axis),
        teacher_softmax=losses.are_probabilities(wanted, axis),
    )


def class_count(objective: Objective, student: Any) -> int | None:
    """How many classes the output tells apart, None for values."""
    return None if objective.axis is None else int(_logits(student).shape[objective.axis])


def _logits(output: Any) -> Tensor:
    logits = losses.logits_of(losses.floating_leaves(output))
    if logits is None:
        raise ModelError("class labels need an output with a batch axis and a class axis")
    return logits


def _value_pairs(student: Any, teacher: Any, labels: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Outputs with what they should be: the labels, else the teacher's outputs leaf by leaf."""
    leaves = losses.floating_leaves(student)
    if labels is not None:
        if leaves[0].numel() != labels.numel():
            raise _shape_error(tuple(labels.shape), tuple(leaves[0].shape))
        return [(leaves[0], labels.reshape(leaves[0].shape).to(leaves[0].dtype))]
    wanted = losses.floating_leaves(teacher)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in wanted]:
        raise _shape_error([tuple(leaf.shape) for leaf in wanted], [tuple(leaf.shape) for leaf in leaves])
    return list(zip(leaves, wanted, strict=True))


def _shape_error(wanted: object, given: object) -> UsageError:
    return UsageError(
        "what recovery should learn has another shape than the model's output",
        found=wanted,
        expected=str(given),
    )


def _given(loss: Tensor | None) -> Tensor:
    return torch.zeros(()) if loss is None else loss
