"""How each kind of layer loses channels: which tensors along which dimension, and which attributes."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCut:
    """Indices removed from a layer's tensors by (tensor, dimension), and its attributes afterwards."""

    removed: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)


def is_weighted(module: nn.Module) -> bool:
    """Whether the layer makes channels of its own."""
    return isinstance(module, (_ConvNd, nn.Linear))


def is_channelwise_norm(module: nn.Module) -> bool:
    """Whether each channel is normalised by itself in evaluation: removing one leaves the others alone."""
    return isinstance(module, (_BatchNorm, _InstanceNorm))


def width(module: nn.Module) -> int:
    """Output channels of a layer that this file can cut."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return int(module.num_features)  # type: ignore[arg-type]


def is_supported(module: nn.Module) -> bool:
    """Whether this file can cut the layer."""
    return is_weighted(module) or is_channelwise_norm(module) or isinstance(module, (nn.GroupNorm, nn.PReLU))


def cuts_whole_groups(conv: _ConvNd) -> bool:
    """Whether a grouped convolution is thinned by whole groups, else by the same positions in each group.

    The choice is the one with the finer steps; a depthwise convolution always loses whole groups.
    """
    return conv.groups > max(conv.in_channels, conv.out_channels) // conv.groups


def cut(module: nn.Module, removed_in: Iterable[int], removed_out: Iterable[int]) -> LayerCut:
    """What removing these input and output channels does to a layer.

    Raises ValueError where the channels do not leave a regular layer (grouped convolutions).
    """
    ins, outs = tuple(sorted(set(removed_in))), tuple(sorted(set(removed_out)))
    if isinstance(module, _ConvNd):
        return _cut_conv(module, ins, outs)
    if isinstance(module, nn.Linear):
        return LayerCut(
            removed=_nonempty({("weight", 0): outs, ("weight", 1): ins, ("bias", 0): outs}, module),
            attributes={
                "in_features": module.in_features - len(ins),
                "out_features": module.out_features - len(outs),
            },
        )
    both = tuple(sorted(set(ins) | set(outs)))
    if isinstance(module, nn.GroupNorm):
        return _cut_group_norm(module, both)
    if isinstance(module, nn.PReLU):
        return LayerCut(
            removed=_nonempty({("weight", 0): both}, module),
            attributes={"num_parameters": module.num_parameters - len(both)},
        )
    tensors = ("weight", "bias", "running_mean", "running_var")
    return LayerCut(
        removed=_nonempty({(name, 0): both for name in tensors}, module),
        attributes={"num_features": width(module) - len(both)},
    )


def _cut_conv(conv: _ConvNd, ins: tuple[int, ...], outs: tuple[int, ...]) -> LayerCut:
    attributes = {
        "in_channels": conv.in_channels - len(ins),
        "out_channels": conv.out_channels - len(outs),
    }
    transposed = isinstance(conv, _ConvTransposeNd)
    removed = {("bias", 0): outs}
    if conv.groups == 1:
        removed |= {("weight", 1 if transposed else 0): outs, ("weight", 0 if transposed else 1): ins}
    elif cuts_whole_groups(conv):
        gone = _whole_groups(conv, ins, outs)
        attributes["groups"] = conv.groups - len(gone)
        removed[("weight", 0)] = ins if transposed else outs
    else:
        in_positions = _positions(ins, conv.in_channels, conv.groups)
        out_positions = _positions(outs, conv.out_channels, conv.groups)
        removed |= (
            {("weight", 0): ins, ("weight", 1): out_positions}
            if transposed
            else {("weight", 0): outs, ("weight", 1): in_positions}
        )
    return LayerCut(removed=_nonempty(removed, conv), attributes=attributes)


def _whole_groups(conv: _ConvNd, ins: tuple[int, ...], outs: tuple[int, ...]) -> set[int]:
    per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    by_in, by_out = {i // per_in for i in ins}, {i // per_out for i in outs}
    if by_in != by_out or len(ins) != len(by_in) * per_in or len(outs) != len(by_out) * per_out:
        raise ValueError("a grouped convolution would lose parts of its groups")
    return by_in


def _positions(removed: tuple[int, ...], channels: int, groups: int) -> tuple[int, ...]:
    per_group = channels // groups
    positions = {i % per_group for i in removed}
    if len(removed) != len(positions) * groups:
        raise ValueError("a grouped convolution would lose a different number of channels by group")
    return tuple(sorted(positions))


def _cut_group_norm(norm: nn.GroupNorm, both: tuple[int, ...]) -> LayerCut:
    per_group = norm.num_channels // norm.num_groups
    gone = {i // per_group for i in both}
    if len(both) != len(gone) * per_group:
        raise ValueError("a group norm would lose parts of its groups")
    return LayerCut(
        removed=_nonempty({("weight", 0): both, ("bias", 0): both}, norm),
        attributes={
            "num_channels": norm.num_channels - len(both),
            "num_groups": norm.num_groups - len(gone),
        },
    )


def _nonempty(
    removed: dict[tuple[str, int], tuple[int, ...]], module: nn.Module
) -> dict[tuple[str, int], tuple[int, ...]]:
    return {
        (name, dim): indices
        for (name, dim), indices in removed.items()
        if indices and getattr(module, name, None) is not None
    }
