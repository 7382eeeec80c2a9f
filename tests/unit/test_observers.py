"""Histogram observers against float64 searches over the raw values, and inside the PT2E flow."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

observers = pytest.importorskip("exporters.observers")

from targets.errors import ModelError, UsageError  # noqa: E402  # after the optional import above

SPEC = {
    "dtype": torch.int8,
    "quant_min": -128,
    "quant_max": 127,
    "qscheme": torch.per_tensor_affine,
}


def made(kind: str, batches: list[Tensor], **settings: float) -> nn.Module:
    observer = observers.observer_for(kind, **settings)(**SPEC)
    for batch in batches:
        assert observer(batch) is batch
    return observer


def quantization_error(values: np.ndarray, scale: float, zero_point: int, bits: int = 8) -> float:
    half = 2 ** (bits - 1)
    levels = np.clip(np.rint(values / scale) + zero_point, -half, half - 1)
    return float(np.mean(((levels - zero_point) * scale - values) ** 2))


def least_error(values: np.ndarray) -> float:
    """The best mean squared error over a dense grid of both ends, on the raw values in float64."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    best = math.inf
    for low_share in np.linspace(0.02, 1, 50) if low < 0 else [1.0]:
        for high_share in np.linspace(0.02, 1, 50):
            scale = (high * high_share - low * low_share) / 255
            best = min(best, quantization_error(values, scale, round(-128 - low * low_share / scale)))
    return best


SAMPLES = {
    "relu with outliers": lambda g: np.concatenate([np.maximum(g.normal(size=8000), 0), [30.0, 45.0]]),
    "heavy tails": lambda g: g.standard_t(3, size=8000),
    "shifted": lambda g: 3 + g.normal(size=8000),
    "two sides apart": lambda g: np.concatenate([g.exponential(size=6000), -0.05 * g.random(2000), [-20.0]]),
    "uniform": lambda g: g.uniform(-1, 1, size=8000),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_range_comes_close_to_the_best_of_a_dense_search(name: str) -> None:
    values = SAMPLES[name](np.random.default_rng(0)).astype(np.float32)
    scale, zero_point = made("mse", list(torch.from_numpy(values).split(1000))).calculate_qparams()
    found = quantization_error(values.astype(np.float64), float(scale), int(zero_point))
    assert found <= 1.05 * least_error(values.astype(np.float64))


def test_mse_clips_outliers_that_min_max_keeps_when_levels_are_few() -> None:
    values = SAMPLES["heavy tails"](np.random.default_rng(0)).astype(np.float32)
    errors = {}
    for kind in ("mse", "min-max"):
        observer = observers.observer_for(kind)(**{**SPEC, "quant_min": -8, "quant_max": 7})
        observer(torch.from_numpy(values))
        scale, zero_point = observer.calculate_qparams()
        errors[kind] = quantization_error(values.astype(np.float64), float(scale), int(zero_point), bits=4)
    assert errors["mse"] < 0.5 * errors["min-max"]


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_range_is_numpys_quantile_to_a_bin(percentile: float) -> None:
    values = np.random.default_rng(1).normal(size=50_000).astype(np.float32)
    observer = made("percentile", list(torch.from_numpy(values).split(999)), percentile=percentile)
    low, high = observer.range()
    expected = np.quantile(values, [1 - percentile / 100, percentile / 100], method="inverted_cdf")
    width = 2 * float(observer.reach) / observers.BINS
    assert (low, high) == pytest.approx(tuple(expected), abs=2 * width)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_order_and_size_of_batches_do_not_matter(kind: str) -> None:
    values = torch.from_numpy(SAMPLES["heavy tails"](np.random.default_rng(2)).astype(np.float32))
    growing = values[values.abs().argsort()]
    whole = made(kind, [values])
    pieces = made(kind, list(growing.split(37)))
    assert torch.equal(whole.counts, pieces.counts)
    assert whole.range() == pieces.range()


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_memory_is_bounded_and_every_value_is_counted(kind: str) -> None:
    observer = made(kind, [])
    size = sum(buffer.numel() * buffer.element_size() for buffer in observer.buffers())
    for scale in (0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30, 3e38):
        observer(torch.linspace(-1, 1, 1001) * scale)
    assert int(observer.counts.sum()) == 7 * 1001
    assert sum(buffer.numel() * buffer.element_size() for buffer in observer.buffers()) == size < 70_000


@pytest.mark.parametrize("kind", ["min-max", "percentile", "mse"])
@pytest.mark.parametrize("constant", [0.0, 5.0, -0.25, 1e-9])
def test_constant_activations_are_represented(kind: str, constant: float) -> None:
    scale, zero_point = made(kind, [torch.full((4, 3), constant)] * 2).calculate_qparams()
    assert float(scale) >= observers.XNNPACK_EPS
    assert -128 <= int(zero_point) <= 127
    error = quantization_error(np.full(3, constant), float(scale), int(zero_point))
    assert error <= (float(scale) / 2) ** 2


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_nan_and_never_observed_are_errors(kind: str) -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ModelError, match="finite"):
            made(kind, [torch.tensor([1.0, bad])])
    with pytest.raises(ModelError, match="never observed"):
        made(kind, [torch.ones(0)]).calculate_qparams()


def test_symmetric_mse_range_has_its_zero_in_the_middle() -> None:
    observer = observers.MeanSquaredErrorObserver(**{**SPEC, "qscheme": torch.per_tensor_symmetric})
    observer(torch.from_numpy(SAMPLES["heavy tails"](np.random.default_rng(3)).astype(np.float32)))
    low, high = observer.range()
    assert low == -high
    assert int(observer.calculate_qparams()[1]) == 0


def test_unknown_observers_and_percentiles_are_refused() -> None:
    with pytest.raises(UsageError, match="percentile"):
        observers.observer_for("percentil")
    with pytest.raises(UsageError, match="percentile"):
        observers.observer_for("percentile", percentile=40.0)(**SPEC)
    with pytest.raises(UsageError, match="per tensor"):
        observers.MeanSquaredErrorObserver(dtype=torch.int8, qscheme=torch.per_channel_symmetric)


@pytest.mark.parametrize("kind", ["min-max", "percentile", "mse"])
def test_the_xnnpack_quantizer_takes_the_observer_and_the_model_still_answers(kind: str) -> None:
    quantizer_module = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    batches = [torch.randn(2, 1, 8, 8) for _ in range(4)]
    config = quantizer_module.get_symmetric_quantization_config(is_per_channel=True)
    changed = observers.with_observer(config, kind)
    assert changed.weight == config.weight
    quantizer = quantizer_module.XNNPACKQuantizer().set_global(changed)
    prepared = prepare_pt2e(torch.export.export(net.eval(), (batches[0],)).module(), quantizer)
    wanted = type(observers.observer_for(kind)(**SPEC))
    assert sum(isinstance(module, wanted) for module in prepared.modules()) >= 4
    for batch in batches:
        prepared(batch)
    converted = convert_pt2e(prepared)
    reference, answer = net(batches[0]).detach(), converted(batches[0]).detach()
    assert not torch.equal(reference, answer)
    assert 10 * torch.log10(reference.square().sum() / (reference - answer).square().sum()) > 25


def test_dynamic_activations_keep_having_no_observer() -> None:
    quantizer_module = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = quantizer_module.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    assert observers.with_observer(config, "mse") == config
