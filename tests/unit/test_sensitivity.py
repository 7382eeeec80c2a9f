"""Layer sensitivity against quantization done by hand, and the choice of float layers."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from calibration.compare import SNR_CAP_DB, snr_db
from deploy.quantization.sensitivity import (
    choose_float_layers,
    combined_snr_db,
    fake_quantize_activation,
    fake_quantize_weight,
    layer_sensitivity,
)
from targets.errors import ModelError, UsageError


def trained_digits() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A small convolutional network trained on real handwritten digits, and batches to measure with."""
    pictures, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(((pictures - 4.88) / 6.01).astype(np.float32).reshape(-1, 1, 8, 8))
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(6):
        for index in torch.randperm(1200).split(64):
            loss = nn.functional.cross_entropy(net(images[index]), torch.from_numpy(labels)[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval(), [(images[1200:1328],), (images[1328:1456],)]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    return trained_digits()


def by_hand(net: nn.Module, inputs: list[tuple[Tensor, ...]], chosen: set[str]) -> float:
    """The output SNR with these layers of a Sequential quantized, written out with numpy rounding."""
    reference, candidate = [], []
    seen = {name: [math.inf, -math.inf] for name in chosen}
    with torch.no_grad():
        for (x,) in inputs:
            for name, layer in net.named_children():
                if name in chosen:
                    seen[name] = [min(seen[name][0], float(x.min())), max(seen[name][1], float(x.max()))]
                x = layer(x)
            reference.append(x.numpy())
        for (x,) in inputs:
            for name, layer in net.named_children():
                x = _quantized_layer(layer, x, *seen[name]) if name in chosen else layer(x)
            candidate.append(x.numpy())
    return snr_db(np.concatenate(reference), np.concatenate(candidate))


def _quantized_layer(layer: nn.Module, x: Tensor, low: float, high: float) -> Tensor:
    weight = layer.weight.detach().double().numpy()
    rounded = np.empty_like(weight)
    for channel in range(len(weight)):
        step = np.abs(weight[channel]).max() / 127
        rounded[channel] = np.rint(weight[channel] / step) * step
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    levels = np.clip(np.rint(x.double().numpy() / step) + zero, 0, 255)
    inputs = torch.from_numpy((levels - zero) * step).float()
    weights = torch.from_numpy(rounded).float()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weights, layer.bias)
    return nn.functional.conv2d(inputs, weights, layer.bias, padding=layer.padding)


def test_each_layer_alone_has_the_snr_of_quantizing_it_by_hand(
    digits: tuple[nn.Module, list[tuple[Tensor, ...]]],
) -> None:
    net, inputs = digits
    measured = layer_sensitivity(net, inputs)
    assert [snr for _, snr in measured] == sorted(snr for _, snr in measured)
    assert {name for name, _ in measured} == {"0", "2", "4", "6", "8", "12"}
    for name, snr in measured:
        assert snr == pytest.approx(by_hand(net, inputs, {name}), abs=0.3)


def test_noise_powers_of_layers_add_on_a_trained_network(
    digits: tuple[nn.Module, list[tuple[Tensor, ...]]],
) -> None:
    net, inputs = digits
    measured = layer_sensitivity(net, inputs)
    together = by_hand(net, inputs, {name for name, _ in measured})
    assert combined_snr_db([snr for _, snr in measured]) == pytest.approx(together, abs=2.0)


def test_chosen_float_layers_reach_the_wanted_snr_when_tried(
    digits: tuple[nn.Module, list[tuple[Tensor, ...]]],
) -> None:
    net, inputs = digits
    measured = layer_sensitivity(net, inputs)
    names = {name for name, _ in measured}
    everything = by_hand(net, inputs, names)
    choice = choose_float_layers(measured, wanted_snr_db=everything + 3, measured_snr_db=everything)
    assert 0 < len(choice.layers) < len(names)
    assert choice.all_quantized_snr_db == pytest.approx(everything)
    assert by_hand(net, inputs, names - set(choice.layers)) == pytest.approx(choice.predicted_snr_db, abs=2.0)


def test_the_module_is_as_before_even_when_a_pass_fails(
    digits: tuple[nn.Module, list[tuple[Tensor, ...]]],
) -> None:
    net, inputs = digits
    net.train()
    net[0].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer_sensitivity(net, inputs[:1])
    with pytest.raises(RuntimeError):
        layer_sensitivity(net, [(torch.zeros(2, 3, 8, 8),)])
    assert net.training
    assert not net[0].training
    net.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in net.modules())


def test_fewer_bits_make_more_noise_by_six_decibels_each(
    digits: tuple[nn.Module, list[tuple[Tensor, ...]]],
) -> None:
    net, inputs = digits
    eight, six = dict(layer_sensitivity(net, inputs)), dict(layer_sensitivity(net, inputs, bits=6))
    # Not the first layer: the pictures have 17 grey values, which may fall on the levels or beside them.
    falls = [eight[name] - six[name] for name in eight if name != "0"]
    assert falls == pytest.approx([12.04] * len(falls), abs=3)


def test_zero_channels_and_constant_activations_are_safe() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    nn.init.zeros_(net[0].weight)
    nn.init.constant_(net[0].bias, -1.0)
    measured = dict(layer_sensitivity(net, [(torch.randn(2, 2, 4, 4),)]))
    assert measured == {"0": SNR_CAP_DB, "2": SNR_CAP_DB}


class Odd(nn.Module):
    """Two outputs, a layer called by keyword and twice, a transposed and a parametrized one, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 4))
        self.up = nn.ConvTranspose1d(1, 3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.twice(input=self.twice(x))
        return {"a": self.normed(x), "b": self.up(x[:, None])}


def test_odd_modules_are_measured_and_unreached_layers_left_out() -> None:
    torch.manual_seed(0)
    measured = dict(layer_sensitivity(Odd(), [(torch.randn(16, 6),)]))
    assert set(measured) == {"twice", "normed", "up"}
    # The worst output counts; the other is untouched by "normed" and "up" and would say 200 dB.
    assert all(20 < snr < 80 for snr in measured.values())


def test_a_parametrized_layer_still_works_afterwards() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    before = net(torch.ones(1, 3))
    layer_sensitivity(net, [(torch.randn(4, 3),)])
    assert torch.equal(net(torch.ones(1, 3)), before)
    assert "parametrizations.weight.original0" in dict(net[0].named_parameters())


def test_transposed_convolutions_scale_their_output_channels() -> None:
    weight = torch.randn(4, 3, 2) * torch.tensor([1.0, 100.0, 1e4])[None, :, None]
    error = (fake_quantize_weight(weight, axis=1) - weight).abs().amax((0, 2))
    assert (error <= weight.abs().amax((0, 2)) / 127 / 2 * 1.0001).all()


def test_fake_quantized_values_keep_zero_and_saturate_outside() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 0.5, 3.0, 9.0])
    result = fake_quantize_activation(values, -1.0, 3.0)
    assert result[2] == 0.0
    assert (result - values.clamp(-1, 3)).abs().max() <= 4 / 255
    assert torch.equal(fake_quantize_activation(torch.zeros(3), 0.0, 0.0), torch.zeros(3))


def test_equal_noises_of_two_layers_cost_three_decibels() -> None:
    assert combined_snr_db([40.0, 40.0]) == pytest.approx(40 - 10 * math.log10(2))
    assert combined_snr_db([]) == SNR_CAP_DB


def test_greedy_choice_keeps_the_noisiest_and_weighs_costs() -> None:
    sensitivities = [("a", 20.0), ("b", 21.0), ("c", 50.0)]
    assert choose_float_layers(sensitivities, wanted_snr_db=10).layers == ()
    assert choose_float_layers(sensitivities, wanted_snr_db=20.5).layers == ("a",)
    assert choose_float_layers(sensitivities, wanted_snr_db=30).layers == ("a", "b")
    dear = {"a": 10.0, "b": 1.0, "c": 1.0}
    assert choose_float_layers(sensitivities, wanted_snr_db=19.5, costs=dear).layers == ("b",)
    everything = choose_float_layers(sensitivities, wanted_snr_db=80)
    assert everything.layers == ("a", "b", "c")
    assert everything.predicted_snr_db == SNR_CAP_DB


def test_no_inputs_and_broken_outputs_are_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(UsageError):
        layer_sensitivity(net, [])
    nn.init.constant_(net.weight, math.nan)
    with pytest.raises(ModelError, match="NaN"):
        layer_sensitivity(net, [(torch.ones(1, 2),)])
