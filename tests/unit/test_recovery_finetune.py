"""Fine-tuning a damaged copy of a small network on real handwritten digits."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deploy.modes import MOST_THREADS
from deploy.recovery.finetune import (
    Progress,
    Recovered,
    TrainingData,
    batches_of,
    learning_rate_at,
    recover,
    split,
)
from targets.detect import usable_cores
from targets.errors import ModelError, UsageError


def digits(samples: int = 600) -> TrainingData:
    pictures, labels = load_digits(return_X_y=True)
    images = (pictures / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return TrainingData(inputs={"image": images[:samples]}, labels=labels[:samples])


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(144, 10),
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "c.pt"
    start = network()
    return recover(
        start, None, digits(), epochs=8, learning_rate=5e-3, batch_size=32, seed=0, checkpoint=path
    ).module


def pruned(dense: nn.Module) -> nn.Module:
    """The dense network without half of its first channels: a real structural cut."""
    small = network(4)
    kept = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for name in list(kept):
        if name.startswith("0.") and kept[name].ndim:
            kept[name] = kept[name][:4]
    kept["1.0.weight"] = kept["1.0.weight"][:, :4]
    small.load_state_dict(kept)
    return small.eval()


def run(student: nn.Module, teacher: nn.Module | None, path: Path, **changes: Any) -> Recovered:
    arguments = {"epochs": 4, "learning_rate": None, "batch_size": 32, "seed": 3, "checkpoint": path / "c.pt"}
    data = changes.pop("data", digits())
    return recover(student, teacher, data, **{**arguments, **changes})


def state_bytes(module: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())


def test_recovery_wins_back_what_pruning_lost(dense: nn.Module, tmp_path: Path) -> None:
    unseen = load_digits(return_X_y=True)
    images = torch.from_numpy((unseen[0][900:] / 16).astype(np.float32).reshape(-1, 1, 8, 8))

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(images).argmax(1).numpy() == unseen[1][900:]).mean())

    damaged = pruned(dense)
    result = run(damaged, dense.eval(), tmp_path)
    assert accuracy(damaged) < accuracy(dense) - 0.1
    assert accuracy(result.module) > accuracy(dense) - 0.05
    assert result.best_epoch > 0
    assert [point.epoch for point in result.history] == list(range(len(result.history)))


def test_arguments_come_back_as_they_were(dense: nn.Module, tmp_path: Path) -> None:
    student = pruned(dense).train()
    student[0].eval()
    student[4].bias.requires_grad_(False)
    teacher = copy.deepcopy(dense).train()
    before = state_bytes(student), state_bytes(teacher), torch.get_rng_state(), torch.get_num_threads()
    result = run(student, teacher, tmp_path, epochs=1)
    after = state_bytes(student), state_bytes(teacher), torch.get_rng_state(), torch.get_num_threads()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]
    assert teacher.training
    for module in (student, result.module):
        assert module.training
        assert not module[0].training
        assert not module[4].bias.requires_grad
        assert module[4].weight.requires_grad
        assert all(parameter.grad is None for parameter in module.parameters())
    assert not torch.equal(result.module[4].bias, student[4].bias)


@pytest.mark.parametrize("outside", [1, 3])
def test_training_has_its_own_number_of_threads(dense: nn.Module, tmp_path: Path, outside: int) -> None:
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(outside)
    try:
        run(pruned(dense), dense, tmp_path, on_progress=lambda p: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == outside
    finally:
        torch.set_num_threads(before)
    assert seen == {min(MOST_THREADS, usable_cores())}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(dense: nn.Module, tmp_path: Path) -> None:
    results = []
    for index, seed in enumerate((5, 5, 6)):
        torch.manual_seed(index)
        folder = tmp_path / str(index)
        results.append(state_bytes(run(pruned(dense), dense, folder, epochs=1, seed=seed).module))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_result_never_scores_below_the_start(dense: nn.Module, tmp_path: Path) -> None:
    result = run(dense, dense, tmp_path, epochs=2, learning_rate=3.0)
    assert result.history[0].score >= max(point.score for point in result.history[1:])
    assert result.best_epoch == 0


def test_early_stop_ends_hopeless_training_and_says_so(dense: nn.Module, tmp_path: Path) -> None:
    result = run(dense, dense, tmp_path, epochs=30, learning_rate=3.0, data=digits(100))
    assert len(result.history) < 31
    assert "without a better score" in result.note


def test_masked_weights_stay_zero(dense: nn.Module, tmp_path: Path) -> None:
    mask = torch.rand(16, 8, 3, 3) > 0.5
    result = run(dense, dense, tmp_path, epochs=1, masks={"1.0.weight": mask})
    assert (result.module[1][0].weight[~mask] == 0).all()
    assert (result.module[1][0].weight[mask] != 0).any()
    with pytest.raises(UsageError, match="mask"):
        run(dense, dense, tmp_path, masks={"1.0.weight": mask[:2]})


class Explosive(nn.Module):
    """Answers NaN once its weight has moved far: what too high a learning rate does."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.linear, self.reach = nn.Linear(64, 10), reach

    def forward(self, image: Tensor) -> Tensor:
        far = self.linear.weight.abs().max() > self.reach
        return self.linear(image.flatten(1)) + torch.where(far, torch.nan, 0.0)


def test_nan_goes_back_and_halves_the_rate_until_training_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = run(Explosive(0.9), None, tmp_path, learning_rate=0.1, epochs=2)
    assert result.note.count("halved") in (1, 2)
    assert "diverged" not in result.note
    assert result.best_epoch > 0
    assert all(math.isfinite(point.loss) for point in result.history)


def test_divergence_that_halving_cannot_stop_returns_the_best_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Explosive(1.0)
    result = run(student, None, tmp_path, learning_rate=1e6)
    assert "diverged" in result.note
    assert result.best_epoch == 0
    assert state_bytes(result.module) == state_bytes(student)


def test_regression_without_labels_follows_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = TrainingData(inputs={"x": np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)})
    teacher = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    student = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    result = run(student, teacher, tmp_path, data=data, epochs=20, learning_rate=1e-2)
    assert result.history[result.best_epoch].score > result.history[0].score + 10


def test_two_inputs_arrive_in_the_models_order(tmp_path: Path) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, token: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.table(token) * scale)}

    generator = np.random.default_rng(0)
    inputs = {
        "token": generator.integers(0, 5, 64),
        "scale": np.ones((64, 1), dtype=np.float32),
    }
    data = TrainingData(inputs=inputs, labels=inputs["token"] % 2)
    result = run(TwoInputs(), None, tmp_path, data=data, epochs=12, learning_rate=5e-2)
    assert result.history[result.best_epoch].score == 1.0


def test_progress_counts_every_step_once(dense: nn.Module, tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(pruned(dense), dense, tmp_path, epochs=2, on_progress=seen.append)
    assert [progress.step for progress in seen] == list(range(1, seen[0].steps + 1))
    assert seen[-1].seconds_left == 0
    assert all(math.isfinite(progress.loss) for progress in seen)


def test_a_finished_checkpoint_answers_at_once_and_another_trainings_is_ignored(
    dense: nn.Module, tmp_path: Path
) -> None:
    first = run(pruned(dense), dense, tmp_path, epochs=1)
    seen: list[Progress] = []
    again = run(pruned(dense), dense, tmp_path, epochs=1, on_progress=seen.append)
    assert state_bytes(again.module) == state_bytes(first.module)
    assert again.history == first.history
    assert not seen
    run(pruned(dense), dense, tmp_path, epochs=1, seed=9, on_progress=seen.append)
    assert seen


def test_a_damaged_checkpoint_is_ignored(dense: nn.Module, tmp_path: Path) -> None:
    first = run(pruned(dense), dense, tmp_path, epochs=1)
    path = tmp_path / "c.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert state_bytes(run(pruned(dense), dense, tmp_path, epochs=1).module) == state_bytes(first.module)


def test_held_out_tenth_is_apart_and_a_lone_sample_joins_a_batch() -> None:
    train, held = split(105, seed=1)
    assert len(held) == 10
    assert sorted([*train, *held]) == list(range(105))
    assert not np.array_equal(held, split(105, seed=2)[1])
    assert [len(piece) for piece in batches_of(np.arange(65), 32)] == [32, 33]


def test_rate_warms_up_and_falls_as_a_cosine() -> None:
    shares = [learning_rate_at(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(shares) == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] < 0.02
    assert learning_rate_at(0, 1) == 1.0


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ({}, None),
        ({"x": np.zeros((3, 2), dtype=np.float32)}, None),
        ({"x": np.zeros((8, 2), dtype=np.float32)}, np.zeros(7, dtype=np.int64)),
        ({"x": np.full((8, 2), np.nan, dtype=np.float32)}, None),
        ({"x": np.zeros((), dtype=np.float32)}, None),
    ],
)
def test_data_that_cannot_train_is_refused(inputs: dict[str, np.ndarray], labels: np.ndarray | None) -> None:
    with pytest.raises(UsageError):
        TrainingData(inputs=inputs, labels=labels)


def test_settings_labels_and_models_that_cannot_train_are_refused(dense: nn.Module, tmp_path: Path) -> None:
    for changes in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": math.nan}, {"learning_rate": 0.0}):
        with pytest.raises(UsageError):
            run(dense, None, tmp_path, **changes)
    wrong = TrainingData(inputs=digits(20).inputs, labels=np.full(20, 10))
    with pytest.raises(UsageError, match="classes"):
        run(dense, None, tmp_path, data=wrong)
    with pytest.raises(ModelError, match="training data"):
        run(nn.Linear(3, 10), None, tmp_path)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(broken[1].weight, math.nan)
    with pytest.raises(ModelError, match="before the first step"):
        run(broken, None, tmp_path)
    with pytest.raises(ModelError, match="no floating-point parameter"):
        run(nn.Flatten(), None, tmp_path)
