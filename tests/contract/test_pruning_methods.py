"""What every structured method and every criterion promises."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from oddities import Plain, example, settled
from torch import Tensor, nn
from torch.nn import functional

import deploy.pruning
from deploy.pruning.channels import CRITERIA, ChannelPruning, prune_channels
from deploy.pruning.delta import load_pruned, save_pruned


def loss(module: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        yield functional.cross_entropy(module(images), torch.arange(8))


def pruned(criterion: str, **options: object) -> tuple[nn.Module, ChannelPruning]:
    module = settled(Plain)
    settings = {"sparsity": 0.4, "criterion": criterion, "loss": loss, **options}
    return module, prune_channels(module, example(Plain), **settings)


def test_every_method_of_the_table_is_there() -> None:
    for place in deploy.pruning.METHODS.values():
        module, _, attribute = place.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("criterion", CRITERIA)
class TestChannels:
    def test_the_module_is_not_touched(self, criterion: str) -> None:
        module = settled(Plain).train()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        prune_channels(module, example(Plain), sparsity=0.4, criterion=criterion, loss=loss)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert module.training
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_the_result_runs_and_is_a_narrower_dense_network(self, criterion: str) -> None:
        _, result = pruned(criterion)
        assert result.module(*example(Plain))[0].shape == (10,)
        for change in result.layers:
            layer = result.module.get_submodule(change.layer)
            assert layer.weight.shape[0] == change.after <= change.before

    @pytest.mark.parametrize("of", ["macs", "parameters"])
    @pytest.mark.parametrize("ranking", ["global", "local"])
    def test_achieved_is_within_two_points_of_asked(self, criterion: str, of: str, ranking: str) -> None:
        _, result = pruned(criterion, of=of, ranking=ranking)
        before, after = getattr(result.before, of), getattr(result.after, of)
        assert result.achieved == pytest.approx(1 - after / before)
        assert abs(result.achieved - 0.4) <= 0.02
        assert result.note == ""

    def test_parameters_after_are_those_of_the_module(self, criterion: str) -> None:
        _, result = pruned(criterion)
        assert result.after.parameters == sum(p.numel() for p in result.module.parameters())

    def test_a_seed_repeats_bit_for_bit(self, criterion: str) -> None:
        first, second = pruned(criterion, seed=7)[1], pruned(criterion, seed=7)[1]
        assert first.delta == second.delta
        for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("multiple", [4, 8])
    def test_widths_are_multiples(self, criterion: str, multiple: int) -> None:
        _, result = pruned(criterion, channel_multiple=multiple)
        narrowed = [change for change in result.layers if change.after < change.before]
        assert narrowed
        assert all(change.after % multiple == 0 for change in narrowed)

    def test_first_layer_and_classifier_keep_their_width(self, criterion: str) -> None:
        _, result = pruned(criterion)
        widths = {change.layer: (change.before, change.after) for change in result.layers}
        assert widths["stem.0"] == (32, 32)
        assert widths["classifier"] == (10, 10)

    def test_the_result_exports(self, criterion: str) -> None:
        _, result = pruned(criterion)
        program = torch.export.export(result.module, example(Plain))
        torch.testing.assert_close(program.module()(*example(Plain)), result.module(*example(Plain)))

    def test_a_saved_result_loads_bit_for_bit(self, criterion: str, tmp_path) -> None:
        _, result = pruned(criterion)
        file = tmp_path / "pruned.safetensors"
        save_pruned(result.module, result.delta, file)
        loaded = load_pruned(Plain, file).eval()
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in result.module.state_dict().items())
        assert torch.equal(loaded(*example(Plain)), result.module(*example(Plain)))
