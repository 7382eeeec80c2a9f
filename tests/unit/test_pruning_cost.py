"""Multiply-accumulates against the textbook formulas."""

import pytest
import torch
from torch import nn

from deploy.pruning.cost import count_cost, count_macs

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 10), 10 * 6 * 4 * 3),
    "conv2d": (nn.Conv2d(3, 8, 5, stride=2, padding=2), (1, 3, 16, 16), 8 * 8 * 8 * 3 * 25),
    "conv2d without padding": (nn.Conv2d(3, 8, 3), (1, 3, 10, 12), 8 * 10 * 8 * 3 * 9),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2), (1, 2, 9, 9), 5 * 5 * 4 * 2 * 9),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), (1, 8, 6, 6), 36 * 12 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 36 * 8 * 9),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 5, 6), 4 * 5 * 6 * 4 * 2 * 27),
    # Each input position is multiplied with the whole kernel.
    "transposed": (nn.ConvTranspose2d(6, 4, 2, stride=2), (1, 6, 5, 5), 25 * 6 * 4 * 4),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (1, 6, 5, 5), 25 * 6 * 2 * 4),
    "linear": (nn.Linear(20, 30), (1, 20), 600),
    "linear over a sequence": (nn.Linear(20, 30), (1, 7, 20), 7 * 600),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_one_sample_are_exact(name: str, batch: int) -> None:
    layer, shape, expected = CASES[name]
    inputs = (torch.zeros(batch, *shape[1:]),)
    assert count_cost(layer, inputs).macs == expected
    assert count_cost(layer, inputs).parameters == sum(p.numel() for p in layer.parameters())


def test_macs_are_told_by_module_and_a_shared_layer_counts_each_call() -> None:
    shared = nn.Linear(8, 8)
    total, by_path = count_macs(nn.Sequential(shared, nn.ReLU(), shared), (torch.zeros(2, 8),))
    assert total == 128
    assert by_path["0"] == 128


def test_a_tied_weight_is_one_parameter() -> None:
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    assert count_cost(nn.Sequential(one, two), (torch.zeros(1, 4),)).parameters == 16


def test_counting_leaves_each_submodule_in_its_mode() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    net[1].eval()
    mean = net[1].running_mean.clone()
    count_cost(net, (torch.ones(2, 1, 2, 2),))
    assert [part.training for part in net] == [True, False, True]
    assert torch.equal(net[1].running_mean, mean)
