"""Training a compressed copy of a model until it does what the dense one does again."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.modes import evaluating, own_threads, trainable
from deploy.recovery import batchnorm, features, losses, resume
from deploy.recovery.objective import FEATURE_WEIGHT, Objective, class_count, decide
from targets.errors import ModelError, UsageError

CHECKPOINT_SECONDS = 20.0
HELD_OUT = 0.1
WARM_UP = 0.05
LAST_RATE = 0.01
CLIP_NORM = 1.0
WEIGHT_DECAY = 0.01
MOST_RETREATS = 3
STATISTICS_BATCHES = 64
RATE_WITH_BATCH_NORM, RATE_WITHOUT = 3e-3, 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Arrays (samples, ...) by input name in the model's order, already preprocessed.

    `labels` are classes (integers, -100 for "does not count") or wanted outputs (floats), or None.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        arrays = [*self.inputs.items(), *([] if self.labels is None else [("label", self.labels)])]
        sizes = {name: array.shape[0] if array.ndim else 0 for name, array in arrays}
        if not self.inputs or len(set(sizes.values())) != 1 or min(sizes.values()) < 4:
            raise UsageError(
                "training data cannot be used",
                found=f"samples by array {sizes}",
                expected="at least 4 samples, as many in every array",
            )
        for name, array in arrays:
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise UsageError(f"training data holds NaN or infinity in {name}", expected="finite numbers")

    @property
    def samples(self) -> int:
        """How many there are."""
        return int(next(iter(self.inputs.values())).shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stands: `step` of `steps` over all epochs, the latest loss, an estimate of the rest."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds_left: float


class Point(NamedTuple):
    """An epoch: its mean training loss and the score on held-out samples; epoch 0 is before training.

    The score is accuracy for class labels, else the outputs' signal-to-noise ratio in dB. The loss of
    epoch 0 is that of the held-out samples.
    """

    epoch: int
    loss: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The trained copy, every epoch, the epoch it was taken from, and what a reader should know."""

    module: nn.Module
    history: tuple[Point, ...]
    best_epoch: int
    note: str


def recover(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: TrainingData,
    *,
    epochs: int,
    learning_rate: float | None,
    batch_size: int,
    seed: int,
    checkpoint: Path,
    on_progress: Callable[[Progress], None] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Recovered:
    """A fine-tuned copy of the student that learned from labels and from the dense teacher.

    AdamW (Loshchilov and Hutter 2019) with warm-up, cosine and clipped gradients. A seeded tenth of the
    data is held out; the epoch with the best score there is returned, epoch 0 included, so the result
    never scores below where it started. Batch-norm statistics are measured anew before and after, and
    kept where that scores no worse. All parameters train, also frozen ones; flags and modes come back as
    they were. `masks` maps a parameter's path to True where it may differ from zero; the rest stays zero.

    The same arguments give the same bytes on the same machine, also after a kill at any moment: the state
    is kept in `checkpoint`, which the caller removes. `learning_rate` None means 3e-3 with
    batch-norm and 2e-4 without.

    Raises UsageError for data that does not fit and ModelError for a model that cannot be trained.
    """
    _check(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    module = copy.deepcopy(student)
    rate = learning_rate
    if rate is None:
        rate = RATE_WITH_BATCH_NORM if batchnorm.tracked(module) else RATE_WITHOUT
    held_teacher = nullcontext() if teacher is None else evaluating(teacher)
    with (
        own_threads() as threads,
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        held_teacher,
        trainable(module),
    ):
        settings = _Settings(
            epochs=epochs, rate=rate, batch_size=batch_size, seed=seed, threads=threads, path=checkpoint
        )
        training = _Training(module, teacher, batches, settings, on_progress, masks or {})
        training.run()
    state = training.state
    return Recovered(
        module=module, history=tuple(state.history), best_epoch=state.best_epoch, note="; ".join(state.notes)
    )


def learning_rate_at(step: int, steps: int) -> float:
    """The share of the full rate for a step of 0..steps-1: linear warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * along))


def split(samples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and indices held out (a tenth, at least one), both sorted."""
    order = np.random.default_rng([seed, 0]).permutation(samples)
    held = max(1, round(HELD_OUT * samples))
    return np.sort(order[held:]), np.sort(order[:held])


def batches_of(indices: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Consecutive pieces; a single left-over sample joins the piece before it, as batch-norm needs two."""
    pieces = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [np.concatenate(pieces[-2:])]
    return pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    epochs: int
    rate: float
    batch_size: int
    seed: int
    threads: int
    path: Path

    def __str__(self) -> str:
        return (
            f"epochs {self.epochs} rate {self.rate!r} batch {self.batch_size} seed {self.seed} "
            f"threads {self.threads}"
        )


@dataclass(slots=True, kw_only=True)
class _State:
    """What changes while training, and all that a checkpoint holds beside tensors and optimizer."""

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    retreats: int = 0
    history: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_rank: tuple[float, float] = (-math.inf, -math.inf)
    finished: bool = False


class _Training:
    """The loop: it owns the student's copy and changes it."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: TrainingData,
        settings: _Settings,
        on_progress: Callable[[Progress], None] | None,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.student, self.teacher, self.settings, self.on_progress = student, teacher, settings, on_progress
        self.data = _Samples(data, _device(student))
        self.masks = _fitting_masks(student, masks)
        self.train_indices, self.held_indices = split(data.samples, settings.seed)
        self.objective, self.pairs = self._probe(data)
        self.optimizer = self._new_optimizer()
        self.state = _State()
        self.fingerprint = resume.fingerprint(
            [
                resume.tensors_of(student),
                {} if teacher is None else resume.tensors_of(teacher),
                data.inputs,
                {} if data.labels is None else {"label": data.labels},
                self.masks,
            ],
            str(settings),
        )
        self.steps = len(batches_of(self.train_indices, settings.batch_size))
        self.started, self.saved_at, self.steps_here = time.monotonic(), time.monotonic(), 0

    def run(self) -> None:
        """Trains to the end and leaves the best state in the student."""
        if not self._resume():
            self._begin()
        while not self.state.finished:
            self._epoch()
        resume.restore_(self.student, self.state.best)

    def _probe(self, data: TrainingData) -> tuple[Objective, list[str]]:
        """Decides the losses from the first samples, in evaluation mode."""
        inputs, labels = self.data.batch(np.arange(min(2, data.samples)))
        self.student.eval()
        with torch.no_grad():
            mine = _forward(self.student, inputs)
            theirs = None if self.teacher is None else _forward(self.teacher, inputs)
            objective = decide(mine, theirs, labels)
            _check_classes(data.labels, class_count(objective, mine))
            if self.teacher is None:
                return objective, []
            return objective, features.comparable(
                self.student, self.teacher, lambda module: _forward(module, inputs)
            )

    def _begin(self) -> None:
        """Scores the student as it came, and with batch-norm measured anew; the better is epoch 0."""
        _apply_masks(self.student, self.masks)
        came = self._evaluate()
        self._keep_if_better(0, came)
        if batchnorm.tracked(self.student):
            self._reestimate()
            self._keep_if_better(0, self._evaluate())
        if not self.state.best:
            raise ModelError(
                "the model cannot be trained",
                found="NaN or infinite outputs before the first step",
                expected="finite outputs of student and dense model on the training data",
            )
        resume.restore_(self.student, self.state.best)
        score, negative_loss = self.state.best_rank
        self.state.history.append(Point(0, -negative_loss, score))
        self._save()

    def _epoch(self) -> None:
        state, seed = self.state, [self.settings.seed, self.state.epoch, self.state.retreats]
        order = np.random.default_rng(seed).permutation(self.train_indices)
        if state.step == 0:
            torch.manual_seed(int(np.random.default_rng([*seed, 1]).integers(2**62)))
        pieces = batches_of(order, self.settings.batch_size)
        self.student.train()
        for piece in pieces[state.step :]:
            loss = self._step(piece)
            if not math.isfinite(loss):
                self._retreat()
                return
            state.step += 1
            state.loss_sum += loss
            self._tell(loss)
            if time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
                self._save()
        self._close_epoch()

    def _step(self, piece: NDArray[np.int64]) -> float:
        """One update; returns the loss, NaN where loss or gradient are not finite (nothing is updated)."""
        inputs, labels = self.data.batch(piece)
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, labels)
        if not loss.requires_grad:
            raise ModelError("the model cannot be trained", found="outputs that depend on no parameter")
        if not bool(loss.isfinite()):
            return math.nan
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        if not bool(norm.isfinite()):
            return math.nan
        self.optimizer.step()
        _apply_masks(self.student, self.masks)
        return float(loss.detach())

    def _loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        with features.recorded(self.student, self.pairs) as mine:
            output = _forward(self.student, inputs)
        if self.teacher is None:
            return self.objective.loss(output, None, labels)
        with torch.no_grad(), features.recorded(self.teacher, self.pairs) as theirs:
            wanted = _forward(self.teacher, inputs)
        names = [name for name in self.pairs if name in mine and name in theirs]
        hints = losses.feature_mse([mine[name] for name in names], [theirs[name] for name in names])
        return self.objective.loss(output, wanted, labels) + FEATURE_WEIGHT * hints

    def _set_rate(self) -> None:
        done = (self.state.epoch - 1) * self.steps + self.state.step
        share = learning_rate_at(done, self.settings.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * 0.5**self.state.retreats * share

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Score and mean loss on the held-out samples."""
        self.student.eval()
        first = second = loss = 0.0
        for piece in batches_of(self.held_indices, self.settings.batch_size):
            inputs, labels = self.data.batch(piece)
            mine = _forward(self.student, inputs)
            theirs = None if self.teacher is None else _forward(self.teacher, inputs)
            loss += float(self.objective.loss(mine, theirs, labels)) * len(piece)
            one, two = self.objective.tally(mine, theirs, labels)
            first, second = first + one, second + two
        return self.objective.score(first, second), loss / len(self.held_indices)

    def _close_epoch(self) -> None:
        state, scored = self.state, self._evaluate()
        if not math.isfinite(scored[1]):
            self._retreat()
            return
        state.history.append(Point(state.epoch, state.loss_sum / self.steps, scored[0]))
        self._keep_if_better(state.epoch, scored)
        patience = max(3, self.settings.epochs // 3)
        if state.epoch == self.settings.epochs:
            self._finish("")
        elif state.epoch - state.best_epoch >= patience:
            self._finish(f"stopped after epoch {state.epoch}: {patience} epochs without a better score")
        else:
            state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
            self._save()

    def _retreat(self) -> None:
        """Back to the best state with half the rate; after MOST_RETREATS of them training ends."""
        state = self.state
        resume.restore_(self.student, state.best)
        if state.retreats == MOST_RETREATS:
            self._finish(f"training diverged in epoch {state.epoch} after {MOST_RETREATS} halvings and ended")
            return
        state.retreats += 1
        state.notes.append(f"the loss became NaN in epoch {state.epoch} and the rate was halved")
        state.step, state.loss_sum = 0, 0.0
        self.optimizer = self._new_optimizer()
        self._save()

    def _finish(self, note: str) -> None:
        state = self.state
        if note:
            state.notes.append(note)
        if batchnorm.tracked(self.student) and state.best_epoch > 0:
            resume.restore_(self.student, state.best)
            self._reestimate()
            self._keep_if_better(state.best_epoch, self._evaluate())
        state.finished = True
        self._save()

    def _reestimate(self) -> None:
        # Shuffled, because data is often sorted by class.
        order = np.random.default_rng([self.settings.seed, 1]).permutation(self.train_indices)
        pieces = batches_of(order, self.settings.batch_size)[:STATISTICS_BATCHES]
        batchnorm.reestimate_(
            self.student, pieces, lambda module, piece: _forward(module, self.data.batch(piece)[0])
        )

    def _keep_if_better(self, epoch: int, scored: tuple[float, float]) -> None:
        rank = (scored[0], -scored[1])
        if math.isfinite(scored[1]) and (not self.state.best or rank > self.state.best_rank):
            self.state.best = resume.copied(resume.tensors_of(self.student))
            self.state.best_epoch, self.state.best_rank = epoch, rank

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Weight decay on matrices and kernels only, not on biases and norms."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        if not parameters:
            raise ModelError("the model cannot be trained", found="no floating-point parameter")
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.settings.rate)

    def _tell(self, loss: float) -> None:
        self.steps_here += 1
        if self.on_progress is None:
            return
        state, total = self.state, self.settings.epochs * self.steps
        done = (state.epoch - 1) * self.steps + state.step
        left = (total - done) * (time.monotonic() - self.started) / self.steps_here
        self.on_progress(
            Progress(
                epoch=state.epoch,
                epochs=self.settings.epochs,
                step=done,
                steps=total,
                loss=loss,
                seconds_left=left,
            )
        )

    def _save(self) -> None:
        state = {name: getattr(self.state, name) for name in _State.__slots__}
        state["history"] = [tuple(point) for point in self.state.history]
        resume.save(
            self.settings.path,
            {
                "fingerprint": self.fingerprint,
                "state": state,
                "tensors": resume.copied(resume.tensors_of(self.student)),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
            },
        )
        self.saved_at = time.monotonic()

    def _resume(self) -> bool:
        saved = resume.load(self.settings.path, self.fingerprint)
        if saved is None:
            return False
        state = saved["state"]
        state["history"] = [Point(*point) for point in state["history"]]
        self.state = _State(**state)
        resume.restore_(self.student, saved["tensors"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        return True


class _Samples:
    """Training data as tensors on the student's device, by index."""

    def __init__(self, data: TrainingData, device: torch.device) -> None:
        self.inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in data.inputs.values()]
        self.labels = None if data.labels is None else _label_tensor(data.labels)
        self.device = device

    def batch(self, indices: NDArray[np.int64]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Inputs in the model's order, and labels."""
        at = torch.from_numpy(indices)
        inputs = tuple(tensor[at].to(self.device) for tensor in self.inputs)
        return inputs, None if self.labels is None else self.labels[at].to(self.device)


def _label_tensor(labels: NDArray[Any]) -> Tensor:
    if np.issubdtype(labels.dtype, np.floating):
        return torch.from_numpy(np.ascontiguousarray(labels, dtype=np.float32))
    return torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        return module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ModelError(
            f"the model cannot run on the training data: {error}",
            found=f"inputs {shapes}",
            fix="check the arrays of [recover] and their preprocessing against [inputs]",
        ) from error


@torch.no_grad()
def _apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        module.get_parameter(name).mul_(mask)


def _fitting_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name, mask in masks.items():
        if shapes.get(name) != mask.shape:
            raise UsageError(
                f"the mask of {name} fits no parameter",
                found=tuple(mask.shape),
                expected=str(tuple(shapes[name])) if name in shapes else "the path of a parameter",
            )
    return dict(masks)


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


def _check_classes(labels: NDArray[Any] | None, classes: int | None) -> None:
    """Refuses labels outside the classes before the first step instead of in a late batch."""
    if labels is None or classes is None:
        return
    wrong = (labels != losses.IGNORED_LABEL) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise UsageError(
            "a label is none of the model's classes",
            found=int(labels[wrong][0]),
            expected=f"0 to {classes - 1}, or {losses.IGNORED_LABEL} for samples that do not count",
        )


def _check(*, epochs: int, learning_rate: float | None, batch_size: int) -> None:
    if epochs < 1 or batch_size < 1:
        raise UsageError("[recover] cannot be used", found=f"epochs {epochs}, batch_size {batch_size}")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UsageError("[recover] learning_rate cannot be used", found=learning_rate, expected="above 0")
