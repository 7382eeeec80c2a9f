"""Weight masks: exact counts, the ties, and what a mask may thin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oddities import settled
from torch import nn

from deploy.pruning.masks import (
    MOST_SPARSE,
    apply_,
    global_masks,
    held,
    magnitude_masks,
    prunable,
    smallest,
    uniform_masks,
)
from deploy.pruning.onnx_masks import magnitude_masks_
from targets.errors import UsageError


class Net(nn.Module):
    """A first and a last layer, a depthwise convolution, and two layers that a mask may thin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.each = nn.Conv2d(16, 16, 3, groups=16)
        self.mix = nn.Conv2d(16, 32, 1)
        self.inner = nn.Linear(32, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.mix(self.each(self.stem(x))).mean((2, 3))))


@given(st.lists(st.floats(0, 4, width=16), min_size=1, max_size=60), st.integers(0, 60))
def test_exactly_so_many_of_the_smallest_go_and_of_equal_ones_the_first(
    values: list[float], count: int
) -> None:
    count = min(count, len(values))
    chosen = smallest(torch.tensor(values, dtype=torch.float64), count).numpy()
    wanted = sorted(range(len(values)), key=lambda index: (values[index], index))[:count]
    assert np.flatnonzero(chosen).tolist() == sorted(wanted)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_a_global_ranking_removes_the_smallest_of_all_weights(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(size, generator=generator) for name, size in (("a", (40, 30)), ("b", (7, 11)))}
    masks = global_masks(scores, sparsity)
    everything = np.concatenate([scores["a"].numpy().ravel(), scores["b"].numpy().ravel()])
    threshold = np.sort(everything)[round(sparsity * everything.size)]
    for name, mask in masks.items():
        assert np.array_equal(mask.numpy(), scores[name].numpy() >= threshold)


def test_no_layer_is_emptied_by_a_global_ranking_and_the_count_stays_exact() -> None:
    scores = {"faint": torch.arange(1000) / 1e6, "loud": torch.arange(9000) + 1.0}
    masks = global_masks(scores, 0.5)
    assert int((~masks["faint"]).sum()) == MOST_SPARSE * 1000
    assert sum(int((~mask).sum()) for mask in masks.values()) == 5000


def test_a_uniform_ranking_removes_the_same_share_of_every_layer() -> None:
    scores = {"a": torch.rand(10, 10), "b": 100 * torch.rand(50)}
    assert {name: int((~mask).sum()) for name, mask in uniform_masks(scores, 0.7).items()} == {
        "a": 70,
        "b": 35,
    }


def test_the_first_the_last_depthwise_and_excluded_layers_keep_their_weights() -> None:
    assert list(prunable(Net(), ())) == ["mix", "inner"]
    assert list(prunable(Net(), ["inn*"])) == ["mix"]
    with pytest.raises(UsageError, match="matches no module"):
        prunable(Net(), ["outer"])


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="above 0 and below 1"):
        magnitude_masks(Net(), sparsity=sparsity, ranking="global", exclude=())


def test_a_model_without_inner_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights may be removed"):
        magnitude_masks(nn.Sequential(nn.Linear(4, 4)), sparsity=0.5, ranking="global", exclude=())


def test_a_module_carries_its_masks_in_its_zeros() -> None:
    module = settled(Net)
    masks = magnitude_masks(module, sparsity=0.75, ranking="global", exclude=())
    apply_(module, masks)
    carried = held(module, [mask.layer for mask in masks])
    for mask in masks:
        assert torch.equal(carried[f"{mask.layer}.weight"], mask.kept)
    share = sum(mask.zeros for mask in masks) / sum(mask.weights for mask in masks)
    assert share == pytest.approx(0.75, abs=1e-3)


def test_an_onnx_model_gets_the_masks_that_its_module_would(tmp_path) -> None:
    import onnx

    from calibration.spec import TensorSpec
    from exporters.capture import capture
    from exporters.onnx import to_onnx

    module = settled(Net)
    spec = TensorSpec(name="x", shape=("batch", 3, 8, 8), bounds={"batch": (1, 4)})
    source = to_onnx(capture(module, [spec]), tmp_path / "model.onnx")
    model = onnx.load(str(source.file))
    onnx_masks = magnitude_masks_(model.graph, sparsity=0.6, ranking="global", exclude=())
    torch_masks = magnitude_masks(module, sparsity=0.6, ranking="global", exclude=())
    assert [source.modules[mask.layer] for mask in onnx_masks] == [mask.layer for mask in torch_masks]
    assert sum(mask.zeros for mask in onnx_masks) == sum(mask.zeros for mask in torch_masks)
    zeros = {t.name: int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in model.graph.initializer}
    assert sum(zeros.values()) >= sum(mask.zeros for mask in onnx_masks)


def test_a_layer_whose_weight_is_computed_is_left_alone() -> None:
    module = Net()
    nn.utils.parametrizations.weight_norm(module.mix)
    assert list(prunable(module, ())) == ["inner"]


def test_a_uniform_ranking_empties_no_layer() -> None:
    masks = uniform_masks({"tiny": torch.rand(4, 4), "one": torch.rand(1)}, 0.999)
    assert all(mask.any() for mask in masks.values())
