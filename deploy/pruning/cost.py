"""What a model costs: parameters and multiply-accumulates of one sample."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.pruning.forward import evaluation, forward_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters, and multiply-accumulates of one sample in convolutions and matrix products.

    Elementwise work and recurrent kernels are not counted.
    """

    parameters: int
    macs: int


def count_cost(module: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """The cost of one sample; the first dimension of the first input counts the samples."""
    total, _ = count_macs(module, inputs)
    return Cost(parameters=count_parameters(module), macs=total)


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one sample: in all, and by the path of the module that did them."""
    counter = FlopCounterMode(display=False)
    with evaluation(module), torch.no_grad(), counter:
        forward_outputs(module, inputs)
    batch = max(1, inputs[0].shape[0]) if inputs and inputs[0].dim() else 1
    root = type(module).__name__
    by_path = {
        name.removeprefix(f"{root}.") if name != root else "": _per_sample(sum(counts.values()), batch)
        for name, counts in counter.get_flop_counts().items()
    }
    return _per_sample(counter.get_total_flops(), batch), by_path


def _per_sample(flops: int, batch: int) -> int:
    # A multiply-accumulate is two floating point operations.
    return round(flops / (2 * batch))
