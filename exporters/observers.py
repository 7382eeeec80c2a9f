"""Observers of activation ranges for PT2E quantization that torchao does not have.

torchao 0.18 has min-max, moving average and a histogram observer whose search shrinks the range in
single steps; it has no percentile. The two here keep a histogram of fixed size whose range doubles
when needed, so that counts stay exact however many batches pass.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import MinMaxObserver, UniformQuantizationObserverBase

from targets.errors import ModelError, UsageError, nearest

Kind = Literal["min-max", "percentile", "mse"]
Config = TypeVar("Config")

BINS = 8192
XNNPACK_EPS = 2**-12
_CANDIDATES = 128
_PASSES = 2
_PIECE = 1 << 20


class _HistogramRangeObserver(UniformQuantizationObserverBase):  # type: ignore[misc]  # torchao is untyped
    """Counts activations in BINS equal bins over [-reach, reach]; `reach` is a power of two.

    A value beyond it doubles the reach and merges neighbouring bins, which keeps every count exact.
    Between BINS / 4 and BINS / 2 bins cover the larger side of the values seen.
    """

    counts: Tensor
    reach: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise UsageError("this observer works per tensor", found=self.qscheme)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("reach", torch.zeros((), dtype=torch.float64))
        self.register_buffer("min_val", torch.tensor(math.inf))
        self.register_buffer("max_val", torch.tensor(-math.inf))

    def forward(self, x_orig: Tensor) -> Tensor:
        """Counts the values and passes them on unchanged. Raises ModelError for NaN and infinity."""
        if x_orig.numel() == 0:
            return x_orig
        values = x_orig.detach().float()
        low, high = torch.aminmax(values)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError("an activation is not finite during calibration", found=f"{low} to {high}")
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        self._widen(max(abs(float(low)), abs(float(high))))
        self._count(values)
        return x_orig

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range; it always holds zero."""
        if self.min_val > self.max_val:
            raise ModelError(
                "an activation was never observed",
                fix="calibrate with data that reaches every part of the model",
            )
        low, high = self.range()
        scale, zero_point = self._calculate_qparams(
            torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
        )
        return scale, zero_point

    def range(self) -> tuple[float, float]:
        """The range to represent."""
        raise NotImplementedError

    def _widen(self, peak: float) -> None:
        """Doubles the reach until the peak fits."""
        if peak <= float(self.reach):
            return
        wanted = 2.0 ** math.ceil(math.log2(peak))
        if float(self.reach) == 0.0:
            self.reach.fill_(wanted)
            return
        doublings = round(math.log2(wanted / float(self.reach)))
        self.counts.copy_(_merged(self.counts, doublings))
        self.reach.fill_(wanted)

    def _count(self, values: Tensor) -> None:
        reach = float(self.reach)
        if reach == 0.0:
            self.counts[BINS // 2] += values.numel()
            return
        # In float64, where counts are exact and the edges of tiny and huge ranges exist; in pieces, to
        # bound the memory that takes.
        flat = values.flatten()
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE].double() / reach
            self.counts += torch.histc(piece, BINS, -1.0, 1.0).to(torch.int64)

    def _centres(self) -> tuple[Tensor, Tensor]:
        """Centres of the bins that hold something, within the values seen, and their counts (float64)."""
        filled = self.counts.nonzero().flatten()
        width = 2 * float(self.reach) / BINS
        centres = (filled.double() + 0.5) * width - float(self.reach)
        return centres.clamp(float(self.min_val), float(self.max_val)), self.counts[filled].double()


class PercentileObserver(_HistogramRangeObserver):
    """The range that leaves the outermost 1 - percentile / 100 of the values out on either side."""

    def __init__(self, *, percentile: float = 99.99, **settings: Any) -> None:
        super().__init__(**settings)
        if not 50.0 < percentile <= 100.0:
            raise UsageError("percentile cannot be used", found=percentile, expected="above 50, at most 100")
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        """Quantiles from the histogram, exact to one bin."""
        share = self.percentile / 100
        return self._quantile(1 - share), self._quantile(share)

    def _quantile(self, share: float) -> float:
        total = self.counts.cumsum(0).double()
        rank = share * float(total[-1])
        index = min(int(torch.searchsorted(total, rank)), BINS - 1)
        before = float(total[index - 1]) if index else 0.0
        inside = (rank - before) / max(float(self.counts[index]), 1.0)
        value = (index + min(max(inside, 0.0), 1.0)) * 2 * float(self.reach) / BINS - float(self.reach)
        return min(max(value, float(self.min_val)), float(self.max_val))


class MeanSquaredErrorObserver(_HistogramRangeObserver):
    """The range with the least mean squared rounding and clipping error.

    Searched over shares of the values' range, one end at a time (Choukroun et al. 2019, "Low-bit
    Quantization of Neural Networks for Efficient Inference", minimise the same error).
    """

    def range(self) -> tuple[float, float]:
        """The best ends found; never wider than what was seen."""
        low, high = min(float(self.min_val), 0.0), max(float(self.max_val), 0.0)
        if low == high:
            return low, high
        centres, counts = self._centres()
        lows, highs = _shares(low), _shares(high)
        if self.qscheme == torch.per_tensor_symmetric:
            ends = torch.maximum(-_shares(low), _shares(high))
            best = int(self._errors(centres, counts, -ends, ends).argmin())
            return -float(ends[best]), float(ends[best])
        # Both ends together first; then each with the other fixed.
        best = int(self._errors(centres, counts, lows, highs).argmin())
        low, high = float(lows[best]), float(highs[best])
        for _ in range(_PASSES):
            high = _least(highs, self._errors(centres, counts, torch.full_like(highs, low), highs), high)
            low = _least(lows, self._errors(centres, counts, lows, torch.full_like(lows, high)), low)
        return low, high

    def _errors(self, centres: Tensor, counts: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
        """The summed squared error of each candidate range (all float64)."""
        levels = self.quant_max - self.quant_min
        scale = ((highs - lows) / levels).clamp_min(float(self.eps))[:, None]
        zero_point = (-lows[:, None] / scale).round().clamp(0, levels)
        quantized = ((centres / scale).round() + zero_point).clamp(0, levels)
        errors: Tensor = ((quantized - zero_point) * scale - centres).square() @ counts
        return errors


def observer_for(kind: Kind, *, eps: float = XNNPACK_EPS, percentile: float = 99.99) -> Callable[..., Any]:
    """A constructor for QuantizationSpec.observer_or_fake_quant_ctr; `eps` is the smallest scale.

    Raises UsageError for an unknown kind.
    """
    if kind == "min-max":
        constructor: Callable[..., Any] = MinMaxObserver.with_args(eps=eps)
    elif kind == "percentile":
        constructor = PercentileObserver.with_args(eps=eps, percentile=percentile)
    elif kind == "mse":
        constructor = MeanSquaredErrorObserver.with_args(eps=eps)
    else:
        known = ["min-max", "percentile", "mse"]
        raise UsageError(
            "unknown observer",
            found=kind,
            expected=", ".join(known),
            fix=f"did you mean {nearest(kind, known, 1)[0]}?",
        )
    return constructor


def with_observer(config: Config, kind: Kind) -> Config:
    """An XNNPACK QuantizationConfig whose static activations are observed this way.

    Weights keep their observer; dynamic activations have none and stay as they are.
    """
    changed = {}
    for name in ("input_activation", "output_activation"):
        spec = getattr(config, name)
        if spec is not None and not spec.is_dynamic:
            changed[name] = dataclasses.replace(spec, observer_or_fake_quant_ctr=observer_for(kind))
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]  # a dataclass of executorch


def _merged(counts: Tensor, doublings: int) -> Tensor:
    """Counts over twice the reach, `doublings` times: neighbours merge, empty bins join outside."""
    factor = min(2**doublings, BINS // 2)
    inner = counts.reshape(-1, factor).sum(1)
    empty = torch.zeros((BINS - len(inner)) // 2, dtype=counts.dtype)
    return torch.cat([empty, inner, empty])


def _shares(end: float) -> Tensor:
    """Candidates for one end of the range: from 1/128 of it to all of it, float64."""
    return end * torch.arange(1, _CANDIDATES + 1, dtype=torch.float64) / _CANDIDATES


def _least(candidates: Tensor, errors: Tensor, current: float) -> float:
    """The candidate with the least error; all errors equal keep the current one."""
    return current if bool((errors == errors[0]).all()) else float(candidates[int(errors.argmin())])
