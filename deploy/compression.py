"""`deploy.compress`: a module in memory comes back smaller, as the target's runtime wants it."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import sources
from calibration.dataset import Dataset
from calibration.spec import DTYPES, TensorSpec
from deploy import project
from deploy.modes import evaluating
from deploy.planner import Pruning, make_plan
from deploy.pruning.planned import prune_as_planned
from exporters.capture import check_forward, order_inputs
from targets.catalog import find
from targets.errors import MissingRequirementError, ModelError, UsageError, WrongOutputsError

if TYPE_CHECKING:
    from deploy.planner import Plan

SPARSITIES = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
MOST_BATCH = 64
ORIGIN = "data"

Arrays = Mapping[str, np.ndarray[Any, Any] | Tensor] | np.ndarray[Any, Any] | Tensor
Evaluate = Callable[[nn.Module], float]


def compress(
    module: nn.Module,
    *,
    target: str,
    data: Arrays,
    evaluate: Evaluate | None = None,
    max_drop: float = 0.01,
    train: Arrays | None = None,
    epochs: int = 2,
    learning_rate: float | None = None,
    batch_size: int = 64,
    sparsity: float | None = None,
    of: str = "macs",
    criterion: str = "auto",
    ranking: str = "global",
    min_channels: int = 8,
    exclude: Sequence[str] = (),
    pattern: str = "auto",
    runtime: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """A pruned copy of the module, its widths in the steps of the target's runtime; the module stays as is.

    `data` are samples (n, ...) as the model takes them: one array, or arrays by input name, with `label`
    for the criterion "taylor". With `train`, likewise, the copy is fine-tuned with the module as teacher;
    its `label` are classes or wanted outputs and may be left out.

    `sparsity` is the fraction of multiply-adds (or parameters) to remove. `evaluate` scores a module,
    higher is better: a copy that loses more than `max_drop` is refused. Without a sparsity it chooses:
    the largest of 60, 50, ... 10 % that loses no more. One of the two is needed, since nobody else can say
    what pruning may cost.

    Raises UsageError for what does not fit or a pattern the target does not execute, WrongOutputsError when
    every sparsity loses too much, ModelError for a module that cannot be cut. `deploy.prune` gives the
    record of what was removed; `deploy.build` also quantizes and exports.
    """
    if sparsity is None and evaluate is None:
        raise UsageError(
            "nothing says how much may be removed",
            found="neither sparsity nor evaluate",
            expected="sparsity=, or evaluate= with max_drop=",
            fix="for example sparsity=0.4",
        )
    samples = _samples(module, data, "data")
    training = None if train is None else _samples(module, train, "train")
    tables = {
        "sparsity": sparsity or SPARSITIES[0], "of": of, "criterion": criterion, "ranking": ranking,
        "min_channels": min_channels, "exclude": list(exclude), "pattern": pattern,
    }  # fmt: skip
    pruning = _pruning(_plan(samples.specs, tables, target, runtime))
    wanted = [sparsity] if sparsity is not None else list(SPARSITIES)
    settings = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}

    def make(fraction: float) -> nn.Module:
        asked = replace(pruning, sparsity=fraction)
        smaller = prune_as_planned(module, samples, asked, seed=seed).module
        return smaller if training is None or epochs == 0 else _recover(smaller, module, training, settings)

    return make(wanted[0]) if evaluate is None else _within(module, make, wanted, evaluate, max_drop)


def _samples(module: nn.Module, data: Arrays, origin: str) -> Dataset:
    """The arrays as a checked dataset, its inputs in the order of forward."""
    arrays = {name: _array(value) for name, value in _by_name(module, data).items()}
    specs = tuple(_spec(name, array) for name, array in arrays.items() if name != sources.LABEL)
    if not specs:
        raise UsageError(f"{origin} holds no input", expected="samples by input name", fix="add them")
    ordered, _ = order_inputs(module, specs)
    dataset = sources.from_arrays(arrays, ordered, origin=origin)
    with evaluating(module):
        check_forward(module, ordered)
    return dataset


def _by_name(module: nn.Module, data: Arrays) -> Mapping[str, Any]:
    if isinstance(data, Mapping):
        return data
    import inspect

    parameters = list(inspect.signature(module.forward).parameters)
    return {parameters[0] if parameters else "input": data}


def _array(value: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _spec(name: str, array: np.ndarray[Any, Any]) -> TensorSpec:
    if array.ndim == 0 or str(array.dtype) not in DTYPES:
        raise UsageError(
            f"{name} does not fit",
            found=f"{array.dtype} {array.shape}",
            expected=f"samples along the first dimension, of {', '.join(DTYPES)}",
            fix="convert it",
        )
    shape = ("batch", *array.shape[1:])
    return TensorSpec(name=name, shape=shape, dtype=str(array.dtype), bounds={"batch": (1, MOST_BATCH)})


def _plan(specs: Sequence[TensorSpec], prune: dict[str, Any], target: str, runtime: str | None) -> "Plan":
    """The plan of a build with these inputs, for its channel multiple, its pattern and its refusals."""
    inputs = {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype} for spec in specs}
    tables = {"model": {"source": "a module in memory"}, "inputs": inputs, "prune": prune}
    here = project.Project(file=Path.cwd() / "deploy.toml", tables=project.check(tables, origin="compress"))
    return make_plan(here, find(target), runtimes=[runtime] if runtime else ())


def _pruning(plan: "Plan") -> Pruning:
    if plan.pruning is None:
        raise UsageError(
            "nothing would be pruned",
            found=f"the pattern {plan.pattern}",
            expected="structured",
            fix='leave pattern out, or pattern="structured"',
        )
    if plan.pattern != "structured":
        raise MissingRequirementError(
            f"the pattern {plan.pattern} cannot be made yet",
            found="a pattern of masks",
            expected="structured",
            fix='use pattern="structured"',
        )
    return plan.pruning


def _recover(
    student: nn.Module, teacher: nn.Module, training: Dataset, settings: Mapping[str, Any]
) -> nn.Module:
    from deploy.recovery.finetune import TrainingData, recover

    batch = training.batch(0, len(training))
    with tempfile.TemporaryDirectory() as scratch:
        done = recover(
            student,
            teacher,
            TrainingData(inputs=batch, labels=training.labels),
            checkpoint=Path(scratch) / "resume.ckpt",
            **settings,
        )
    return done.module


def _within(
    module: nn.Module,
    make: Callable[[float], nn.Module],
    wanted: Sequence[float],
    evaluate: Evaluate,
    max_drop: float,
) -> nn.Module:
    """The first copy, most removed first, that scores within max_drop of the module."""
    reference = _score(evaluate, module)
    tried: list[str] = []
    for sparsity in wanted:
        try:
            smaller = make(sparsity)
        except (UsageError, ModelError) as error:  # a step that the channel multiple cannot reach
            if sparsity == wanted[-1] and not any("scores" in line for line in tried):
                raise
            tried.append(f"{sparsity:.0%}: {error.what}")
            continue
        score = _score(evaluate, smaller)
        if reference - score <= max_drop:
            return smaller
        tried.append(f"{sparsity:.0%} scores {score:.4g}")
    raise WrongOutputsError(
        "pruning costs more than max_drop",
        found="; ".join(tried),
        expected=f"at least {reference - max_drop:.4g}, the module scores {reference:.4g}",
        fix="ask for a smaller sparsity, give train= data to recover with, or raise max_drop",
    )


def _score(evaluate: Evaluate, module: nn.Module) -> float:
    with evaluating(module), torch.no_grad():
        score = float(evaluate(module))
    if not math.isfinite(score):
        raise UsageError("evaluate gave no finite number", found=score, expected="a score, higher is better")
    return score
