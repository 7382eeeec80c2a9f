"""Recovery's losses against their formulas in float64, and the choice among them."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy.recovery import batchnorm, features, losses
from deploy.recovery.objective import TEACHER_SHARE, TEMPERATURE, decide
from targets.errors import ModelError, UsageError


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    p = softmax(teacher.double().numpy() / temperature)
    q = softmax(student.double().numpy() / temperature)
    return float(temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=-1)))


def test_distillation_is_the_kullback_leibler_divergence_at_the_temperature() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), 3 * torch.randn(6, 5)
    for temperature in (1.0, 2.0, 7.0):
        loss = losses.distillation_kl(student, teacher, temperature=temperature)
        assert float(loss) == pytest.approx(kl_by_hand(student, teacher, temperature), rel=1e-5)
    assert float(losses.distillation_kl(teacher, teacher, temperature=4.0)) == pytest.approx(0, abs=1e-6)


def test_temperature_squared_keeps_the_gradients_size() -> None:
    torch.manual_seed(0)
    sizes = []
    for temperature in (10.0, 100.0):
        student = torch.zeros(4, 5, requires_grad=True)
        losses.distillation_kl(student, torch.randn(4, 5), temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


def test_segmentation_puts_classes_on_axis_one_and_text_on_the_last() -> None:
    assert losses.class_axis((2, 5, 4, 4), (2, 4, 4)) == 1
    assert losses.class_axis((2, 7, 50), (2, 7)) == 2
    assert losses.class_axis((2, 10), (2,)) == 1
    assert losses.class_axis((2, 10), (3,)) is None
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 4, 4))
    one_by_one = [
        -math.log(softmax(logits[n, :, i, j].double().numpy())[labels[n, i, j]])
        for n in range(2)
        for i in range(4)
        for j in range(4)
    ]
    assert float(losses.label_cross_entropy(logits, labels, axis=1)) == pytest.approx(
        np.mean(one_by_one), rel=1e-5
    )


def test_ignored_labels_do_not_count_even_when_there_are_no_others() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 9.0]])
    loss = losses.label_cross_entropy(logits, torch.tensor([0, -100]))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(losses.label_cross_entropy(logits, torch.tensor([-100, -100]))) == 0.0


def test_feature_loss_has_no_unit() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    small = losses.feature_mse([student], [teacher])
    large = losses.feature_mse([student * 1000], [teacher * 1000])
    assert float(small) == pytest.approx(float(large), rel=1e-5)
    assert float(losses.feature_mse([], [])) == 0.0


def test_outputs_of_every_kind_give_their_tensors() -> None:
    @dataclasses.dataclass
    class Answer:
        ids: Tensor
        logits: Tensor

    class Pair(NamedTuple):
        pooled: Tensor
        logits: Tensor

    logits, flat = torch.randn(2, 3), torch.randn(2)
    for output in (
        logits,
        (flat, logits),
        {"a": flat, "b": [logits]},
        Answer(torch.arange(2), logits),
        Pair(flat, logits),
    ):
        assert losses.logits_of(losses.floating_leaves(output)) is logits
    assert losses.logits_of([flat]) is None


def test_class_labels_mix_cross_entropy_and_teacher() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    objective = decide(student, teacher, labels)
    own = nn.functional.cross_entropy(student, labels)
    expected = (1 - TEACHER_SHARE) * float(own) + TEACHER_SHARE * kl_by_hand(student, teacher, TEMPERATURE)
    assert float(objective.loss(student, teacher, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(decide(student, None, labels).loss(student, None, labels)) == pytest.approx(float(own))


def test_a_model_that_ends_in_softmax_has_the_loss_of_its_logits() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = decide(student, teacher, labels).loss(student, teacher, labels)
    ended = decide(student.softmax(1), teacher.softmax(1), labels)
    assert float(ended.loss(student.softmax(1), teacher.softmax(1), labels)) == pytest.approx(
        float(plain), rel=1e-5
    )


def test_values_without_labels_follow_the_teacher_in_every_output() -> None:
    student = {"a": torch.tensor([[1.0, 1.0]]), "b": torch.tensor([2.0])}
    teacher = {"a": torch.tensor([[2.0, 2.0]]), "b": torch.tensor([1.0])}
    objective = decide(student, teacher, None)
    assert float(objective.loss(student, teacher, None)) == pytest.approx((1 / 4 + 1) / 2)
    assert objective.score(*objective.tally(student, teacher, None)) == pytest.approx(10 * math.log10(4))


def test_score_is_accuracy_over_the_labels_that_count() -> None:
    logits, labels = torch.eye(4), torch.tensor([0, 1, 3, -100])
    objective = decide(logits, None, labels)
    assert objective.tally(logits, None, labels) == (2.0, 3.0)
    assert objective.score(2.0, 3.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "error"),
    [
        (torch.randn(2, 3), None, None, UsageError),
        (torch.arange(2), torch.arange(2), None, ModelError),
        (torch.randn(2, 3), None, torch.tensor([[0], [1]]), UsageError),
        (torch.randn(2, 1), None, torch.tensor([0, 1]), UsageError),
        (torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 1]), UsageError),
        (torch.randn(2, 3), torch.randn(2, 4), None, UsageError),
        (torch.randn(2, 3), None, torch.randn(2, 2), UsageError),
        (torch.randn(2), None, torch.tensor([0, 1]), ModelError),
    ],
)
def test_nothing_to_learn_from_is_refused(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        decide(student, teacher, labels)


class Block(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def test_blocks_of_equal_shape_are_compared_and_pruned_insides_are_not() -> None:
    dense = nn.Sequential(*[Block(6, 12) for _ in range(10)], nn.Linear(6, 3))
    pruned = nn.Sequential(*[Block(6, 5) for _ in range(10)], nn.Linear(6, 3))
    names = features.comparable(pruned, dense, lambda module: module(torch.randn(2, 6)))
    assert len(names) == 6
    assert names[-1] == "9"
    assert all(isinstance(pruned.get_submodule(name), Block) for name in names)
    with features.recorded(pruned, names) as outputs:
        pruned(torch.randn(2, 6))
    assert all(outputs[name].shape == (2, 6) for name in names)
    pruned(torch.randn(5, 6))
    assert outputs["9"].shape == (2, 6)


def test_a_module_called_twice_is_not_compared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.once(self.twice(self.twice(x)))

    assert features.comparable(Shared(), Shared(), lambda module: module(torch.randn(2, 4))) == ["once"]


def test_reestimated_statistics_are_the_datas_mean_and_variance() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    data = [5 + 2 * torch.randn(50, 3) for _ in range(8)]
    batchnorm.reestimate_(net, data, lambda module, batch: module(batch))
    norm = net[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in data]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in data]).mean(0))
    assert norm.momentum == 0.1
    assert not norm.training
