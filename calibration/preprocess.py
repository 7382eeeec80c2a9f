"""What is done to raw data before the model sees it: the settings of deploy.toml, applied to batches.

The order is the contract, for this code and for every app bundle: log-mel, layout, resize, crop,
scale, mean, std.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from targets.errors import UsageError, nearest

Array = NDArray[Any]
Floats = NDArray[np.float32]

LAYOUTS = ("nhwc-to-nchw",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Height and width of a picture."""

    height: int
    width: int

    def __post_init__(self) -> None:
        _require(self.height >= 1 and self.width >= 1, "a picture's size", self, "at least 1 x 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMel:
    """Sound to a log-mel picture; see `log_mel` for the exact definition.

    `frame`, `hop` and `fft` are in samples, `low_hz` and `high_hz` in Hz. `fft` is the next power of
    two of `frame` and `high_hz` half the sample rate where not given.
    """

    sample_rate: int
    frame: int
    hop: int
    bands: int
    fft: int | None = None
    low_hz: float = 0.0
    high_hz: float | None = None
    floor: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("sample_rate", "frame", "hop", "bands"):
            _require(getattr(self, name) >= 1, f"log-mel {name}", getattr(self, name), "at least 1")
        _require(self.floor > 0, "log-mel floor", self.floor, "more than 0, its logarithm is taken")
        _require(self.fft_size >= self.frame, "log-mel fft", self.fft, f"at least frame = {self.frame}")
        in_order = 0 <= self.low_hz < self.top_hz <= self.sample_rate / 2
        found = f"{self.low_hz} to {self.top_hz}"
        _require(in_order, "log-mel band edges in Hz", found, f"within 0 to {self.sample_rate / 2}")

    @property
    def fft_size(self) -> int:
        """Length of the Fourier transform in samples."""
        return 1 << (self.frame - 1).bit_length() if self.fft is None else self.fft

    @property
    def top_hz(self) -> float:
        """Upper edge of the highest band in Hz."""
        return self.sample_rate / 2 if self.high_hz is None else self.high_hz


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """The settings of deploy.toml's `preprocess`, applied in the order of the fields.

    `mean` and `std` are one number, or one for each entry of axis 1 (the channels after layout).
    """

    log_mel: LogMel | None = None
    layout: str | None = None
    resize: Size | None = None
    crop: Size | None = None
    scale: float | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        known = self.layout is None or self.layout in LAYOUTS
        _require(known, "preprocess layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        for name in ("scale", "mean", "std"):
            value = getattr(self, name)
            _require(
                value is None or bool(np.isfinite(value).all()), f"preprocess {name}", value, "finite numbers"
            )
        _require(self.std is None or bool(np.all(self.std)), "preprocess std", self.std, "no zeros")


def from_mapping(settings: Mapping[str, Any]) -> Preprocess:
    """Settings as deploy.toml and manifest.json hold them; `log-mel` may also be spelled `log_mel`.

    Raises UsageError for unknown keys, wrong types and values out of range.
    """
    given = {key.replace("-", "_"): value for key, value in settings.items() if value is not None}
    _check_keys(given, Preprocess, "preprocess")
    return Preprocess(
        log_mel=_table(given.get("log_mel"), LogMel, "preprocess log-mel"),
        layout=given.get("layout"),
        resize=_table(given.get("resize"), Size, "preprocess resize"),
        crop=_table(given.get("crop"), Size, "preprocess crop"),
        scale=_number(given.get("scale"), "preprocess scale"),
        mean=_numbers(given.get("mean"), "preprocess mean"),
        std=_numbers(given.get("std"), "preprocess std"),
    )


def apply(preprocess: Preprocess, array: Array) -> Floats:
    """A batch of raw data (batch, ...) of any real dtype as the model takes it, in float32.

    The input is never changed. Raises UsageError where the data does not fit the settings.
    """
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_) or np.iscomplexobj(array):
        raise UsageError("data cannot be preprocessed", found=f"dtype {array.dtype}", expected="real numbers")
    if preprocess.log_mel is not None:
        array = log_mel(preprocess.log_mel, array)
    if preprocess.layout is not None:
        _check_axes(array, 4, "layout", "(batch, height, width, channels)")
        array = array.transpose(0, 3, 1, 2)
    result = np.ascontiguousarray(array, dtype=np.float32)
    if preprocess.resize is not None:
        result = resize_bilinear(result, preprocess.resize)
    if preprocess.crop is not None:
        result = crop_centre(result, preprocess.crop)
    return _normalise(preprocess, np.array(result) if result is array else result)


def log_mel(settings: LogMel, samples: Array) -> Floats:
    """Sound (batch, samples) to log-mel pictures (batch, 1, frames, bands), computed in float64.

    1. Frame i holds the samples i*hop to i*hop + frame - 1; there are 1 + (samples - frame) // hop of
       them, without padding; samples beyond the last whole frame are not used.
    2. Each frame is multiplied by the periodic Hann window 0.5 - 0.5 cos(2 pi n / frame) and padded with
       zeros at its end to `fft` samples.
    3. Power spectrum: |X[k]|^2, k = 0 to fft / 2, not divided by anything.
    4. bands + 2 edges lie evenly on the HTK mel scale, mel = 2595 log10(1 + Hz / 700), from low_hz to
       high_hz. Band b is the triangle that rises linearly in Hz from edge b (0) to edge b + 1 (1) and
       falls to edge b + 2 (0), sampled at the bins' frequencies k * sample_rate / fft, not normalised.
    5. Natural logarithm of max(sum over the band, floor).

    Samples count as they are: integers are not divided by their range. Raises UsageError for data
    shorter than a frame and for bands so narrow that no bin falls into them.
    """
    _check_axes(samples, 2, "log-mel", "(batch, samples)")
    if samples.shape[1] < settings.frame:
        raise UsageError(
            "sound is shorter than one log-mel frame",
            found=f"{samples.shape[1]} samples",
            expected=f"at least {settings.frame}",
        )
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.frame) / settings.frame)
    views = np.lib.stride_tricks.sliding_window_view(samples, settings.frame, axis=1)
    frames = views[:, :: settings.hop].astype(np.float64) * window
    power = np.abs(np.fft.rfft(frames, settings.fft_size)) ** 2
    bands = power @ mel_filters(settings)
    return np.log(np.maximum(bands, settings.floor)).astype(np.float32)[:, None]


@lru_cache(maxsize=8)
def mel_filters(settings: LogMel) -> NDArray[np.float64]:
    """Triangular filters (fft / 2 + 1, bands) in float64, read-only; see `log_mel`, step 4."""
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (settings.low_hz, settings.top_hz))
    edges = 700 * (10 ** (np.linspace(low, high, settings.bands + 2) / 2595) - 1)
    hz = np.arange(settings.fft_size // 2 + 1)[:, None] * settings.sample_rate / settings.fft_size
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    if not filters.any(axis=0).all():
        raise UsageError(
            "a log-mel band holds no frequency bin and would be constant",
            found=f"{settings.bands} bands over an fft of {settings.fft_size}",
            fix="use fewer bands or a longer fft",
        )
    filters.flags.writeable = False
    return filters


def resize_bilinear(pictures: Floats, size: Size) -> Floats:
    """Pictures (batch, channels, height, width) at another size: bilinear, half-pixel centres.

    Output pixel i is read at (i + 0.5) * old / new - 0.5, clamped to the picture, without smoothing
    first; as torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False).
    """
    _check_axes(pictures, 4, "resize", "(batch, channels, height, width)")
    if 0 in pictures.shape[2:]:
        raise UsageError("an empty picture cannot be resized", found=pictures.shape)
    return _resize_axis(_resize_axis(pictures, 2, size.height), 3, size.width)


def crop_centre(pictures: Floats, size: Size) -> Floats:
    """The middle of pictures (batch, channels, height, width); an odd rest leaves the smaller half before."""
    _check_axes(pictures, 4, "crop", "(batch, channels, height, width)")
    height, width = pictures.shape[2:]
    if size.height > height or size.width > width:
        raise UsageError(
            "the crop is larger than the picture",
            found=f"crop {size.height} x {size.width} of {height} x {width}",
            expected="a crop within the picture",
            fix="resize first, or crop less",
        )
    top, left = (height - size.height) // 2, (width - size.width) // 2
    return pictures[:, :, top : top + size.height, left : left + size.width]


def _resize_axis(pictures: Floats, axis: int, new: int) -> Floats:
    old = pictures.shape[axis]
    if new == old:
        return pictures
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
    before = np.minimum(at.astype(np.int64), old - 1)
    after = np.minimum(before + 1, old - 1)
    shape = [1] * pictures.ndim
    shape[axis] = new
    weight = (at - before).astype(np.float32).reshape(shape)
    first, second = np.take(pictures, before, axis), np.take(pictures, after, axis)
    resized: Floats = first + (second - first) * weight
    return resized


def _normalise(preprocess: Preprocess, result: Floats) -> Floats:
    if preprocess.scale is not None:
        result = result * np.float32(preprocess.scale)
    if preprocess.mean is not None:
        result = result - _per_channel(preprocess.mean, result, "mean")
    if preprocess.std is not None:
        result = result / _per_channel(preprocess.std, result, "std")
    return np.ascontiguousarray(result, dtype=np.float32)


def _per_channel(values: float | tuple[float, ...], array: Floats, name: str) -> Floats:
    """The values shaped to stand along axis 1 of the array."""
    if isinstance(values, int | float):
        return np.asarray(values, dtype=np.float32)
    channels = array.shape[1] if array.ndim > 1 else 0
    if len(values) != channels:
        raise UsageError(
            f"preprocess {name} does not fit the data",
            found=f"{len(values)} values for data of shape {array.shape}",
            expected=f"one number, or {channels}: one for each channel (axis 1)",
        )
    return np.asarray(values, dtype=np.float32).reshape(1, -1, *[1] * (array.ndim - 2))


def _check_axes(array: Array, count: int, step: str, expected: str) -> None:
    if array.ndim != count:
        raise UsageError(
            f"preprocess {step} does not fit the data", found=f"shape {array.shape}", expected=expected
        )


def _require(holds: bool, what: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{what} cannot be used", found=found, expected=expected)


Table = TypeVar("Table", Size, LogMel)


def _table(given: Any, kind: type[Table], what: str) -> Table | None:
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"{what} cannot be used", found=repr(given), expected="a table")
    values = {key.replace("-", "_"): value for key, value in given.items() if value is not None}
    _check_keys(values, kind, what)
    for name, value in values.items():
        whole = isinstance(value, int) or name in ("low_hz", "high_hz", "floor")
        _require(whole and _is_number(value), f"{what} {name}", repr(value), "a number, whole for sizes")
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{what} is not complete: {error}") from error


def _check_keys(given: Mapping[str, Any], kind: type[Any], what: str) -> None:
    known = [field.name for field in fields(kind)]
    for key in given:
        if key not in known:
            raise UsageError(
                f"{what} has an unknown key",
                found=key,
                expected=", ".join(name.replace("_", "-") if name == "log_mel" else name for name in known),
                fix=f"did you mean {nearest(key, known, 1)[0]}?",
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, what: str) -> float | None:
    if value is None:
        return None
    _require(_is_number(value), what, repr(value), "a number")
    return float(value)


def _numbers(value: Any, what: str) -> float | tuple[float, ...] | None:
    if not isinstance(value, list | tuple):
        return _number(value, what)
    _require(
        len(value) > 0 and all(map(_is_number, value)), what, repr(value), "a number or a list of numbers"
    )
    return tuple(float(number) for number in value)
