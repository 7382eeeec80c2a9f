"""What the library underneath, or a careless request, would let pass in silence."""

import pytest
import torch
from oddities import (
    ChannelShuffle,
    DataclassOutput,
    FrozenWeights,
    HardCodedView,
    PaddedShortcut,
    Plain,
    Recurrent,
    TwoInputs,
    ZeroGamma,
    example,
    settled,
)
from torch import Tensor, nn

from deploy.pruning import proof
from deploy.pruning.channels import ChannelPruning, prune_channels
from deploy.pruning.delta import ArchitectureDelta, TensorDelta
from targets.errors import ModelError, UsageError


def prune(kind: type[nn.Module], **options: object) -> ChannelPruning:
    settings = {"sparsity": 0.3, **options}
    return prune_channels(settled(kind), example(kind), **settings)


def widths(result: ChannelPruning) -> dict[str, int]:
    return {change.layer: change.after for change in result.layers}


def test_frozen_weights_are_pruned_and_stay_frozen() -> None:
    result = prune(FrozenWeights)
    assert abs(result.achieved - 0.3) <= 0.02
    assert not any(parameter.requires_grad for parameter in result.module.parameters())


def test_each_parameter_keeps_its_own_gradient_flag_and_each_module_its_mode() -> None:
    module = settled(Plain).train()
    module.one[0].weight.requires_grad_(False)
    module.two.eval()
    result = prune_channels(module, example(Plain), sparsity=0.3)
    flags = {name: parameter.requires_grad for name, parameter in result.module.named_parameters()}
    assert flags == {name: name != "one.0.weight" for name in flags}
    assert result.module.training
    assert not result.module.two.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_pruning_works_with_gradients_off(context) -> None:
    with context():
        result = prune(Plain)
    assert abs(result.achieved - 0.3) <= 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    inputs = tuple(tensor.to(dtype) for tensor in example(Plain))
    result = prune_channels(settled(Plain).to(dtype), inputs, sparsity=0.3)
    assert {parameter.dtype for parameter in result.module.parameters()} == {dtype}
    assert result.module(*inputs).dtype == dtype


def test_a_multiple_above_every_width_is_refused() -> None:
    with pytest.raises(UsageError, match="no channel can be removed at channel_multiple 64"):
        prune(Plain, channel_multiple=64)


def test_a_ratio_that_the_multiple_cannot_reach_is_refused_with_what_it_can() -> None:
    with pytest.raises(UsageError, match=r"the nearest is \d+\.\d%, the most \d+\.\d%"):
        prune(Plain, sparsity=0.95, channel_multiple=16)


def test_a_ratio_below_the_first_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1\.0% of the multiply-accumulates cannot be removed"):
        prune(Plain, sparsity=0.01, channel_multiple=16)


def test_a_miss_of_more_than_two_points_is_explained() -> None:
    result = prune(Plain, sparsity=0.45, channel_multiple=16)
    assert abs(result.achieved - 0.45) > 0.02
    assert "channel multiple 16" in result.note


def test_multiples_do_not_overshoot() -> None:
    # The library rounds each layer down: 0.37 of a layer becomes 0.5 at 16.
    for asked in (0.2, 0.37, 0.5):
        assert abs(prune(Plain, sparsity=asked, channel_multiple=8).achieved - asked) <= 0.06


def test_every_output_layer_keeps_its_width() -> None:
    result = prune(DataclassOutput)
    assert (widths(result)["logits"], widths(result)["boxes"]) == (10, 4)
    assert result.spared["boxes"] == "its channels are an output of the model"


def test_the_first_layer_of_every_input_keeps_its_width() -> None:
    result = prune(TwoInputs)
    assert (widths(result)["picture.0"], widths(result)["vector"]) == (16, 16)


def test_a_layer_that_two_paths_share_with_an_lstm_is_left_alone() -> None:
    result = prune(Recurrent, min_channels=2)
    assert widths(result)["two"] == 16
    assert "cannot follow" in result.spared["two"]


def test_a_hard_coded_view_is_named_with_its_source_line() -> None:
    with pytest.raises(ModelError, match=r"oddities\.py, line \d+: .*view\(-1, 512\)"):
        prune(HardCodedView)


def test_a_hard_coded_view_spares_only_what_flows_into_it() -> None:
    class Partly(HardCodedView):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(
                nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 32, 3, stride=2, padding=1)
            )

    torch.manual_seed(0)
    result = prune_channels(Partly().eval(), (torch.randn(2, 3, 8, 8),), sparsity=0.3)
    assert widths(result)["one.1"] == 32
    assert widths(result)["one.0"] < 64
    assert "view(-1, 512)" in result.spared["one.1"]


def test_shuffled_channels_are_refuted_and_the_rest_is_pruned() -> None:
    result = prune(ChannelShuffle, min_channels=2)
    assert widths(result)["enter.0"] == 32
    assert "changes the outputs" in result.spared["enter.0"]
    assert abs(result.achieved - 0.3) <= 0.02


def test_taylor_without_a_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="the Taylor criterion needs a loss"):
        prune(Plain, criterion="taylor")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda module: module(*example(Plain)).sum().detach(), "cannot be differentiated"),
        (lambda module: module(*example(Plain)), "cannot be differentiated"),
        (lambda module: module(*example(Plain)).sum() * float("nan"), "not finite"),
        (lambda module: [], "gave nothing"),
    ],
)
def test_a_loss_that_gives_no_gradient_is_refused(loss, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune(Plain, criterion="taylor", loss=loss)


def test_taylor_inside_no_grad_has_its_gradients() -> None:
    with torch.no_grad():
        result = prune(Plain, criterion="taylor", loss=lambda module: module(*example(Plain)).square().sum())
    assert abs(result.achieved - 0.3) <= 0.02


def test_gamma_without_batch_norm_is_refused_with_the_reason() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(1), nn.Linear(32 * 16, 4))
    with pytest.raises(UsageError, match="no batch-norm follows it"):
        prune_channels(net, (torch.randn(1, 3, 8, 8),), sparsity=0.3, criterion="bn")


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_sparsity_outside_the_open_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="the sparsity is out of range"):
        prune(Plain, sparsity=sparsity)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("criterion", "tailor", "Did you mean taylor"),
        ("ranking", "locale", "Did you mean local"),
        ("of", "mac", "Did you mean macs"),
        ("min_channels", 0, "min_channels is out of range"),
        ("channel_multiple", -8, "channel_multiple is out of range"),
        ("exclude", ["thre.*"], "matches no module.*three"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune(Plain, **{option: value})


@pytest.mark.parametrize("pattern", ["two", "two.*", "t[w]o.0"])
def test_excluded_layers_keep_their_width(pattern: str) -> None:
    result = prune(Plain, exclude=[pattern])
    assert widths(result)["two.0"] == 32
    assert result.spared["two.0"] == "excluded by name"
    assert abs(result.achieved - 0.3) <= 0.02


def test_a_model_that_fails_on_the_example_inputs_is_named_by_module_and_line() -> None:
    with pytest.raises(ModelError, match=r"the forward pass fails in stem\.0"):
        prune_channels(settled(Plain), (torch.randn(2, 4, 8, 8),), sparsity=0.3)


def test_a_model_without_differentiable_outputs_is_refused() -> None:
    class Decision(Plain):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).argmax(dim=1)

    with pytest.raises(ModelError, match="no output depends on the parameters"):
        prune_channels(settled(Decision), example(Plain), sparsity=0.3)


def test_weights_that_are_not_finite_are_named() -> None:
    module = settled(Plain)
    module.two[0].weight.data[3, 1, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinity in two\.0\.weight"):
        prune_channels(module, example(Plain), sparsity=0.3)


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    class Undefined(Plain):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) / 0.0

    with pytest.raises(ModelError, match="the outputs of Undefined are not finite"):
        prune_channels(settled(Undefined), example(Plain), sparsity=0.3)


def test_a_wrong_delta_is_refuted_even_where_a_zero_gamma_hides_it() -> None:
    module = settled(ZeroGamma)
    kept = tuple(range(1, 24))
    wrong = tuple(range(23))  # the consumer loses another channel than the producer
    layer = {
        "inner.0.0.weight": TensorDelta(before=(24, 24, 3, 3), after=(23, 24, 3, 3), kept={0: kept}),
        **{
            f"inner.0.1.{name}": TensorDelta(before=(24,), after=(23,), kept={0: kept})
            for name in ("weight", "bias", "running_mean", "running_var")
        },
    }
    attributes = {"inner.0.0": {"out_channels": 23}, "inner.0.1": {"num_features": 23}}
    attributes["outer.0.0"] = {"in_channels": 23}

    def delta(columns: tuple[int, ...]) -> ArchitectureDelta:
        consumer = TensorDelta(before=(24, 24, 3, 3), after=(24, 23, 3, 3), kept={1: columns})
        return ArchitectureDelta(attributes=attributes, tensors={**layer, "outer.0.0.weight": consumer})

    work = proof.disturbed(module.double(), seed=0)
    inputs = tuple(tensor.double() for tensor in example(ZeroGamma))
    assert proof.refute(work, delta(kept), inputs) is None
    assert proof.refute(work, delta(wrong), inputs) is not None


def test_the_padded_trunk_behind_a_spared_stem_is_spared() -> None:
    class Behind(PaddedShortcut):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.enter = nn.Identity()

    torch.manual_seed(0)
    result = prune_channels(Behind().eval(), (torch.randn(2, 3, 8, 8),), sparsity=0.3)
    assert widths(result)["outer.0"] == 32
    assert widths(result)["inner.0"] < 32
