"""Proof that what was cut is what the model no longer needs.

A removed parameter must be worth exactly as much as a zero: the smaller model's outputs equal those of
the dense model with every removed parameter set to zero. Wrong index maps, pads, hard-coded views and
operations that mix channels (a layer norm, a mean over channels) all break this equality.
"""

import torch
from torch import Tensor, nn

from deploy.pruning.delta import ArchitectureDelta, apply_delta, copy_module
from deploy.pruning.forward import ForwardError, forward_outputs
from targets.errors import ModelError

_TOLERANCE = {torch.float64: 1e-7}
_LOOSE_TOLERANCE = 1e-3  # float32 and below, where double precision does not run
_NOISE = 0.1


def disturbed(module: nn.Module, *, seed: int) -> nn.Module:
    """A copy whose parameters are moved a little: no zero (a residual's gamma, say) can hide an error."""
    result = copy_module(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.is_floating_point():
                size = parameter.square().mean().sqrt().item() or 1.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(noise.to(parameter), alpha=_NOISE * size)
    return result


def witness(module: nn.Module, inputs: tuple[Tensor, ...], *, seed: int) -> nn.Module:
    """The module on which a delta is tried: disturbed, or as it is where that leaves the finite numbers.

    Raises ModelError where the module's own outputs are not finite.
    """
    for candidate in (disturbed(module, seed=seed), module):
        if all(torch.isfinite(tensor).all() for tensor in _run(candidate, inputs)):
            return candidate
    raise ModelError(
        f"the outputs of {type(module).__name__} are not finite",
        found="NaN or infinity on the example inputs",
        expected="finite outputs",
        fix="check the weights and the example inputs for NaN",
    )


def masked(module: nn.Module, delta: ArchitectureDelta) -> nn.Module:
    """A copy of the dense module in which every parameter that the delta removes is zero."""
    result = copy_module(module)
    parameters = dict(result.named_parameters())
    with torch.no_grad():
        for name, change in delta.tensors.items():
            for dim, kept in change.kept.items() if name in parameters else ():
                gone = torch.ones(change.before[dim], dtype=torch.bool)
                gone[list(kept)] = False
                parameters[name].index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return result


def refute(module: nn.Module, delta: ArchitectureDelta, inputs: tuple[Tensor, ...]) -> str | None:
    """Why the delta is wrong for this module in evaluation mode, or None when it is proven.

    `module` is one that `witness` gave; the inputs have its dtype.
    """
    expected = _run(masked(module, delta), inputs)
    try:
        found = _run(apply_delta(module, delta), inputs)
    except ForwardError as error:
        return f"the smaller model fails in {error.where} at {error.line} ({_brief(error.cause)})"
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return "the shape of an output would change"
    if any(not _close(one, other) for one, other in zip(found, expected, strict=True)):
        return "the model mixes its channels in a way that changes the outputs"
    return None


def _run(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return forward_outputs(module, tuple(tensor.clone() for tensor in inputs))


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    scale = max(1e-12, expected.abs().max().item())
    # Written so that NaN is no agreement.
    return (found - expected).abs().max().item() <= _TOLERANCE.get(expected.dtype, _LOOSE_TOLERANCE) * scale


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
