"""Every oddity is pruned right, against a reference that knows nothing of dependency graphs.

The reference is the dense network whose layers are fed zeros on the input channels they lose.
"""

import copy

import oddities
import pytest
import torch
from oddities import EXAMPLES, HardCodedView, example, settled
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from deploy.pruning.channels import ChannelPruning, prune_channels
from deploy.pruning.delta import ArchitectureDelta, load_pruned, save_pruned
from deploy.pruning.forward import flatten_tensors

PRUNABLE = [kind for kind in EXAMPLES if kind is not HardCodedView]


def prune(kind: type[nn.Module], **options: object) -> tuple[nn.Module, ChannelPruning]:
    module = settled(kind)
    settings = {"sparsity": 0.3, "min_channels": 2, **options}
    return module, prune_channels(module, example(kind), **settings)


def fed_zeros(module: nn.Module, delta: ArchitectureDelta) -> nn.Module:
    result = copy.deepcopy(module)
    for path, layer in result.named_modules():
        change = delta.tensors.get(f"{path}.weight")
        if change is None or not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        dim = 0 if isinstance(layer, _ConvTransposeNd) else 1
        if dim not in change.kept:
            continue
        mask = torch.zeros(change.before[dim])
        mask[list(change.kept[dim])] = 1.0
        # A plain convolution's weight counts the inputs of one group, a transposed one's all inputs.
        mask = mask.repeat(getattr(layer, "groups", 1) if dim == 1 else 1)
        layer.register_forward_pre_hook(feeder(mask, isinstance(layer, nn.Linear)))
    return result


def feeder(mask: Tensor, last: bool):
    def feed(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x * (mask if last else mask.reshape(-1, *[1] * (x.dim() - 2))),)

    return feed


@pytest.mark.parametrize("kind", PRUNABLE)
@pytest.mark.parametrize("multiple", [1, 4])
def test_outputs_are_those_of_the_dense_network_without_the_channels(
    kind: type[nn.Module], multiple: int
) -> None:
    module, result = prune(kind, channel_multiple=multiple)
    expected = flatten_tensors(fed_zeros(module, result.delta)(*example(kind)))
    found = flatten_tensors(result.module(*example(kind)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PRUNABLE)
def test_something_goes_and_the_asked_fraction_is_met_or_explained(kind: type[nn.Module]) -> None:
    _, result = prune(kind)
    assert result.after.macs < result.before.macs
    assert abs(result.achieved - 0.3) <= 0.02 or "the nearest" in result.note or "the most" in result.note


@pytest.mark.parametrize("kind", PRUNABLE)
def test_attributes_agree_with_tensors(kind: type[nn.Module]) -> None:
    _, result = prune(kind)
    for layer in result.module.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, _ConvNd):
            ends = (layer.in_channels, layer.out_channels // layer.groups)
            if not isinstance(layer, _ConvTransposeNd):
                ends = (layer.out_channels, layer.in_channels // layer.groups)
            assert tuple(layer.weight.shape[:2]) == ends
            assert layer.in_channels % layer.groups == layer.out_channels % layer.groups == 0
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean.shape == layer.weight.shape == (layer.num_features,)
        elif isinstance(layer, nn.GroupNorm):
            assert layer.weight.shape == (layer.num_channels,)
            assert layer.num_channels % layer.num_groups == 0


@pytest.mark.parametrize("kind", PRUNABLE)
def test_a_saved_model_is_rebuilt_from_its_factory(kind: type[nn.Module], tmp_path) -> None:
    _, result = prune(kind)
    save_pruned(result.module, result.delta, tmp_path / "model.safetensors")
    loaded = load_pruned(kind, tmp_path / "model.safetensors").eval()
    pairs = zip(
        flatten_tensors(loaded(*example(kind))), flatten_tensors(result.module(*example(kind))), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", PRUNABLE)
def test_sparsity_of_parameters_is_met_or_explained(kind: type[nn.Module]) -> None:
    _, result = prune(kind, of="parameters", sparsity=0.25)
    removed = 1 - result.after.parameters / result.before.parameters
    assert result.achieved == pytest.approx(removed)
    assert abs(removed - 0.25) <= 0.02 or result.note


def widths(result: ChannelPruning) -> dict[str, tuple[int, int]]:
    return {change.layer: (change.before, change.after) for change in result.layers}


def test_a_residual_trunk_shrinks_together() -> None:
    _, result = prune(oddities.Residual, sparsity=0.5)
    enter, first, second = (widths(result)[name][1] for name in ("enter.0", "outer.0.0", "outer.1.0"))
    assert enter == first == second < 24


def test_a_depthwise_convolution_follows_its_producer() -> None:
    _, result = prune(oddities.Depthwise)
    depthwise = result.module.depthwise[0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels < 48
    assert depthwise.out_channels == result.module.expand[0].out_channels


def test_a_grouped_convolution_keeps_its_groups_alike() -> None:
    _, result = prune(oddities.GroupedConv)
    grouped = result.module.grouped[0]
    assert grouped.groups == 4
    assert grouped.in_channels < 32
    assert grouped.in_channels % 4 == grouped.out_channels % 4 == 0


def test_a_convolution_of_many_groups_loses_whole_groups() -> None:
    _, result = prune(oddities.ManyGroups)
    grouped = result.module.grouped[0]
    assert grouped.groups < 16
    assert grouped.in_channels == 2 * grouped.groups
    assert grouped.out_channels == 4 * grouped.groups


def test_a_padded_shortcut_moves_indices_and_keeps_what_the_pad_fills() -> None:
    _, result = prune(oddities.PaddedShortcut)
    gone = set(range(16)) - set(result.delta.tensors["enter.0.weight"].kept[0])
    gone_after = set(range(32)) - set(result.delta.tensors["outer.0.weight"].kept[0])
    assert gone
    assert gone_after == {channel + 8 for channel in gone}


def test_tied_weights_stay_and_stay_tied(tmp_path) -> None:
    _, result = prune(oddities.TiedWeights)
    assert result.module.one.weight is result.module.two.weight
    assert "tied" in result.spared["one"]
    save_pruned(result.module, result.delta, tmp_path / "model.safetensors")
    loaded = load_pruned(oddities.TiedWeights, tmp_path / "model.safetensors")
    assert loaded.one.weight is loaded.two.weight


def test_a_layer_norm_keeps_its_width_and_the_block_inside_shrinks() -> None:
    _, result = prune(oddities.LayerNormed)
    assert widths(result)["enter"] == (48, 48)
    assert widths(result)["expand"][1] < 96
    assert "LayerNorm" in result.spared["enter"]
