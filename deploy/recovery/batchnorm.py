"""Batch-norm statistics measured anew, which pruning or training left behind."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = TypeVar("Batch")


def tracked(module: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate_(
    module: nn.Module, batches: Iterable[Batch], run: Callable[[nn.Module, Batch], object]
) -> None:
    """Sets running mean and variance to their averages over the batches; `run` makes a forward pass.

    Everything else runs in evaluation mode, so dropout does not blur them. Leaves the module in
    evaluation mode. "Precise BN": Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
    """
    module.eval()
    layers = tracked(module)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for batch in batches:
        run(module, batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
