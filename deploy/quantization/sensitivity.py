"""How much each layer suffers from quantization, measured one layer at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from calibration.compare import SNR_CAP_DB, snr_db
from deploy.modes import evaluating
from deploy.recovery.losses import floating_leaves
from targets.errors import ModelError, UsageError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Range = tuple[float, float]
Inputs = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLayers:
    """Layers that stay float, the output SNR in dB expected then, and the one with none of them float."""

    layers: tuple[str, ...]
    predicted_snr_db: float
    all_quantized_snr_db: float


def layer_sensitivity(module: nn.Module, inputs: Inputs, *, bits: int = 8) -> list[tuple[str, float]]:
    """Output SNR in dB when one convolution or linear layer alone is quantized; most sensitive first.

    Weights: symmetric per output channel. The layer's input: affine per tensor, over the range seen on
    these inputs (batches, each a tuple of the model's positional arguments). One forward pass of the
    model a layer and one more; with several outputs, the worst one's SNR. Layers that these inputs never
    reach are not listed. The module is not changed: a quantized copy of one layer answers in its place
    through a hook.

    Raises UsageError for no inputs or fewer than 2 bits, and ModelError where an output is not finite.
    """
    if not inputs or bits < 2:
        raise UsageError("sensitivity needs inputs and at least 2 bits", found=f"{len(inputs)}, {bits} bits")
    # Eagerly: torch.cond and scan compile their branches, and a compiled branch may not hold these hooks.
    with evaluating(module), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
        with _observed(layers) as ranges:
            reference = _outputs(module, inputs)
        if not all(np.isfinite(output).all() for output in reference):
            raise ModelError("sensitivity cannot be measured", found="NaN or infinity in the model's outputs")
        measured = []
        for name, seen in ranges.items():
            with _quantized(layers[name], seen, bits):
                measured.append((name, _worst_snr_db(reference, _outputs(module, inputs))))
    return sorted(measured, key=lambda pair: pair[1])


def choose_float_layers(
    sensitivities: Sequence[tuple[str, float]],
    *,
    wanted_snr_db: float,
    measured_snr_db: float | None = None,
    costs: Mapping[str, float] | None = None,
) -> FloatLayers:
    """The layers to keep in float so that the rest together reach the wanted output SNR.

    Greedy: the layer with the most noise first, or with the most noise for its cost (its share of time
    or MACs, say; all above 0) where `costs` are given. The assumption is that the layers' noises are
    small and uncorrelated, so that their powers add at the output: 1 / SNR = sum of 1 / SNR of each
    layer (Lin, Talathi and Annapureddy 2016, "Fixed Point Quantization of Deep Convolutional Networks",
    ICML). Where the SNR of the model with all of them quantized was measured, `measured_snr_db`
    scales every layer's noise alike so that the sum agrees with it.
    """
    noises = {name: 10 ** (-snr / 10) for name, snr in sensitivities}
    if measured_snr_db is not None and (total := sum(noises.values())) > 0:
        noises = {name: noise * 10 ** (-measured_snr_db / 10) / total for name, noise in noises.items()}
    weights = dict.fromkeys(noises, 1.0) if costs is None else {name: costs[name] for name in noises}
    order = sorted(noises, key=lambda name: noises[name] / weights[name], reverse=True)
    kept = 0
    while kept < len(order) and _total_snr_db([noises[name] for name in order[kept:]]) < wanted_snr_db:
        kept += 1
    return FloatLayers(
        layers=tuple(order[:kept]),
        predicted_snr_db=_total_snr_db([noises[name] for name in order[kept:]]),
        all_quantized_snr_db=_total_snr_db(list(noises.values())),
    )


def combined_snr_db(snrs_db: Sequence[float]) -> float:
    """The SNR in dB when independent noises of these SNRs meet: their powers add."""
    return _total_snr_db([10 ** (-snr / 10) for snr in snrs_db])


def fake_quantize_weight(weight: Tensor, *, bits: int = 8, axis: int = 0) -> Tensor:
    """Weight rounded to symmetric integers of 2^bits - 1 levels with one scale for each index of `axis`.

    The integers run from -(2^(bits-1) - 1) to 2^(bits-1) - 1; zero stays zero.
    """
    top = 2 ** (bits - 1) - 1
    others = [i for i in range(weight.ndim) if i != axis % weight.ndim]
    scale = (weight.abs().amax(others, keepdim=True) / top).clamp_min(_SMALLEST_SCALE)
    rounded: Tensor = (weight / scale).round().clamp(-top, top) * scale
    return rounded


def fake_quantize_activation(values: Tensor, low: float, high: float, *, bits: int = 8) -> Tensor:
    """Values rounded to 2^bits affine levels over [min(low, 0), max(high, 0)]; outside, they saturate."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (2**bits - 1), _SMALLEST_SCALE)
    zero_point = round(-low / scale)
    levels = (values / scale).round() + zero_point
    rounded: Tensor = (levels.clamp(0, 2**bits - 1) - zero_point) * scale
    return rounded


@contextmanager
def _observed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Range]]:
    """While open, the range of each layer's input so far, by path; filled in the order of first call."""
    ranges: dict[str, Range] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            low, high = torch.aminmax(_input(arguments, keywords).detach())
            before = ranges.get(name, (math.inf, -math.inf))
            ranges[name] = (min(before[0], float(low)), max(before[1], float(high)))

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quantized(layer: nn.Module, seen: Range, bits: int) -> Iterator[None]:
    """While open, the layer answers as its quantized copy does."""
    twin = _quantized_copy(layer, bits)

    def answer(
        _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], _output: Any
    ) -> Tensor:
        values = fake_quantize_activation(_input(arguments, keywords), *seen, bits=bits)
        rest = {name: value for name, value in keywords.items() if name != "input"}
        result: Tensor = twin(values, *arguments[1:], **rest)
        return result

    # First of the layer's hooks, so that the user's own see the quantized answer.
    handle = layer.register_forward_hook(answer, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _quantized_copy(layer: nn.Module, bits: int) -> nn.Module:
    """A layer of the same class and settings, without hooks and parametrizations, its weight fake-quantized.

    Made anew and not by deepcopy: a copied parametrized layer shares its class with the original, and
    removing the parametrization from one would break the other.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise ModelError("a layer without a weight tensor cannot be quantized", found=type(layer).__name__)
    kind: type[nn.Module] = parametrize.type_before_parametrizations(layer)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    kept = {name: value for name, value in vars(layer).items() if name not in vars(twin) and name != "weight"}
    vars(twin).update(kept)
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    quantized = fake_quantize_weight(weight.detach(), bits=bits, axis=axis)
    twin.register_parameter("weight", nn.Parameter(quantized, requires_grad=False))
    bias = layer.bias
    twin.register_parameter("bias", nn.Parameter(bias.detach()) if isinstance(bias, Tensor) else None)
    return twin.eval()


def _input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    values: Tensor = arguments[0] if arguments else keywords["input"]
    return values


def _outputs(module: nn.Module, inputs: Inputs) -> list[NDArray[np.float64]]:
    """Every floating-point output as one flat array over all batches."""
    batches = [[leaf.double().flatten() for leaf in floating_leaves(module(*batch))] for batch in inputs]
    if not batches[0]:
        raise ModelError("sensitivity needs a model with a floating-point output")
    return [torch.cat(leaves).cpu().numpy() for leaves in zip(*batches, strict=True)]


def _worst_snr_db(reference: list[NDArray[np.float64]], candidate: list[NDArray[np.float64]]) -> float:
    return min(snr_db(wanted, given) for wanted, given in zip(reference, candidate, strict=True))


def _total_snr_db(noises: Sequence[float]) -> float:
    total = math.fsum(noises)
    return SNR_CAP_DB if total <= 10 ** (-SNR_CAP_DB / 10) else -10 * math.log10(total)
