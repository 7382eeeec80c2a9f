"""A module's modes and flags and torch's threads, changed for a while and given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from targets.detect import usable_cores

MOST_THREADS = 16


@contextmanager
def trainable(module: nn.Module) -> Iterator[None]:
    """All floating-point parameters take gradients inside; flags and modes come back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(child, child.training) for child in module.modules()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for child, mode in modes:
            child.training = mode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode comes back afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def own_threads() -> Iterator[int]:
    """As many threads as this process has cores, at most 16, whatever OMP_NUM_THREADS says.

    Sums are split between threads, so their last bits, and after some epochs a trained network, depend on
    the number.
    """
    before = torch.get_num_threads()
    threads = min(MOST_THREADS, usable_cores())
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
