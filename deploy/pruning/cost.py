"""What a model costs: parameters and multiply-accumulates of one sample."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.modes import evaluating
from deploy.pruning.forward import ForwardError, forward_outputs
from exporters.quiet import quiet
from exporters.rewrites import unroll_loops_


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
    """Multiply-accumulates of one sample: in all, and by the path of the module that did them.

    Loops that the counter cannot follow (scan, map) are written out first; then only the total is known.
    """
    try:
        with evaluating(module):
            counter = _count(module, inputs)
    except ForwardError as error:
        _forget_compiled()
        counter = _count_written_out(module, inputs, error)
    finally:
        _forget_compiled()
    batch = max(1, inputs[0].shape[0]) if inputs and inputs[0].dim() else 1
    root = type(module).__name__
    by_path = {
        name.removeprefix(f"{root}.") if name != root else "": _per_sample(sum(counts.values()), batch)
        for name, counts in counter.get_flop_counts().items()
    }
    return _per_sample(counter.get_total_flops(), batch), by_path


def _count(module: nn.Module, inputs: tuple[Tensor, ...]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        forward_outputs(module, inputs)
    return counter


def _count_written_out(module: nn.Module, inputs: tuple[Tensor, ...], error: ForwardError) -> FlopCounterMode:
    """Counts the exported graph with its loops unrolled; the first error when that does not run either."""
    try:
        with evaluating(module), quiet(), torch.no_grad():
            graph = torch.export.export(module, inputs, strict=False).module()
        unroll_loops_(graph)
        graph.recompile()
        return _count(graph, inputs)
    except Exception:
        raise error from error.cause


def _forget_compiled() -> None:
    """Drops what control flow compiled under the counter: it would answer later calls wrongly."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _per_sample(flops: int, batch: int) -> int:
    # A multiply-accumulate is two floating point operations.
    return round(flops / (2 * batch))
