"""Trains the small models that have no published weights, once: the weights are kept in the user's cache.

The cache's key is this file, the model's file, the training data, their augmentation and torch's version.
"""

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
Augment = Callable[[Tensor], Tensor]


def cache_folder() -> Path:
    """Where trained weights and downloaded models are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "edge-deploy-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def trained(
    module: nn.Module,
    model_file: Path,
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    learning_rate: float = 4e-3,
    augment: Augment | None = None,
) -> Weights:
    """The module's weights after `fit`, from the cache where it was done before.

    `inputs` are what the model takes, after preprocessing.
    """
    augmentation = inspect.getsource(augment) if augment else ""
    recipe = f"{epochs} {learning_rate} {torch.__version__} {augmentation}".encode()
    sources = [
        Path(__file__).read_bytes(),
        model_file.read_bytes(),
        recipe,
        inputs.tobytes(),
        labels.tobytes(),
    ]
    key = hashlib.sha256(b"".join(hashlib.sha256(source).digest() for source in sources)).hexdigest()
    kept = cache_folder() / f"{model_file.parent.name}-{key[:16]}.safetensors"
    if not kept.exists():
        data = torch.from_numpy(inputs), torch.from_numpy(labels)
        fit(module, *data, epochs=epochs, learning_rate=learning_rate, augment=augment)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        save_file(module.state_dict(), partial)
        os.replace(partial, kept)
    return load_file(kept)


def fit(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    augment: Augment | None,
) -> None:
    """Changes the module: AdamW with a one-cycle rate over batches of 64, seeded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler, which scan starts, touches deprecated attributes
        torch.manual_seed(0)
        reset(module)
        module.train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.02)
        total = epochs * -(-len(labels) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(64):
                given = augment(inputs[batch]) if augment else inputs[batch]
                loss(module(given), labels[batch]).backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    module.eval()
    torch.set_num_threads(threads)


def loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy; of a dictionary, the sum over the digit and whether it is odd."""
    if isinstance(output, dict):
        return loss(output["digit"], labels) + loss(output["odd"], labels % 2)
    return nn.functional.cross_entropy(output, labels, label_smoothing=0.05)


def reset(module: nn.Module) -> None:
    """Draws all weights again, so that they depend on the seed alone."""
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()


def settle(module: nn.Module, shape: tuple[int, ...]) -> Weights:
    """Seeded random weights whose outputs move with the inputs.

    Batch-norm statistics are taken from noise: with the initial ones, activations of a deep random
    network shrink or grow from layer to layer until little but the last bias is left.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        reset(module)
        for norm in (child for child in module.modules() if isinstance(child, nn.BatchNorm2d)):
            norm.momentum = None
        module.train()
        for _ in range(2):
            module(torch.randn(shape))
    module.eval()
    return module.state_dict()
