"""Preprocessing against torch and against the definitions written out in float64."""

import math

import msgspec
import numpy as np
import pytest
import torch

from calibration.preprocess import LogMel, Preprocess, Size, apply, from_mapping, mel_filters
from deploy import project
from targets.errors import UsageError

SOUND = LogMel(sample_rate=8000, frame=200, hop=80, bands=20, low_hz=50.0)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (16, 16), (30, 41), (1, 9), (12, 10)])
def test_resize_is_torchs_bilinear_with_half_pixel_centres(height: int, width: int) -> None:
    pictures = np.random.default_rng(0).normal(size=(2, 3, 12, 10)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pictures).double(), (height, width), mode="bilinear", align_corners=False
    )
    result = apply(Preprocess(resize=Size(height=height, width=width)), pictures)
    np.testing.assert_allclose(result, expected.numpy(), atol=2e-6)


def test_steps_run_in_the_order_of_the_contract() -> None:
    raw = np.random.default_rng(1).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
    settings = from_mapping(
        {
            "std": [0.5, 0.25, 2.0],
            "mean": [0.1, 0.2, 0.3],
            "scale": 1 / 255,
            "crop": {"height": 6, "width": 5},
            "resize": {"height": 8, "width": 8},
            "layout": "nhwc-to-nchw",
        }
    )
    picture = torch.nn.functional.interpolate(
        torch.from_numpy(raw).permute(0, 3, 1, 2).float(), (8, 8), mode="bilinear", align_corners=False
    )
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.5, 0.25, 2.0]))
    expected = (picture[:, :, 1:7, 1:6] / 255 - mean) / std
    result = apply(settings, raw)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-5)


def test_log_mel_follows_its_definition_written_out_in_loops() -> None:
    samples = np.random.default_rng(2).normal(size=(2, 1000)).astype(np.float32)
    result = apply(Preprocess(log_mel=SOUND), samples)
    assert result.shape == (2, 1, 11, 20)
    np.testing.assert_allclose(result[:, 0], _log_mel_by_hand(samples), atol=1e-5)


def test_log_mel_power_is_torchs_stft_without_centring() -> None:
    samples = np.random.default_rng(3).normal(size=(2, 2048)).astype(np.float64)
    settings = LogMel(sample_rate=16000, frame=256, hop=100, bands=12)
    window = torch.hann_window(256, periodic=True, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(samples), 256, 100, window=window, center=False, return_complex=True
    )
    power = spectrum.abs().square().transpose(1, 2).numpy()
    expected = np.log(np.maximum(power @ mel_filters(settings), 1e-6))
    np.testing.assert_allclose(apply(Preprocess(log_mel=settings), samples)[:, 0], expected, atol=1e-5)


def test_silence_is_the_logarithm_of_the_floor() -> None:
    result = apply(Preprocess(log_mel=SOUND), np.zeros((1, 400), dtype=np.int16))
    np.testing.assert_allclose(result, math.log(1e-6), rtol=1e-6)


def test_a_tone_is_loudest_in_the_band_around_it() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(2000) / 8000)[None]
    loudest = apply(Preprocess(log_mel=SOUND), tone)[0, 0].mean(axis=0).argmax()
    mel = np.linspace(2595 * math.log10(1 + 50 / 700), 2595 * math.log10(1 + 4000 / 700), 22)
    centres = (700 * (10 ** (mel / 2595) - 1))[1:-1]
    assert loudest == np.abs(centres - 1000).argmin()


def test_settings_of_deploy_toml_arrive_whole() -> None:
    text = '{"log-mel": {"sample_rate": 8000, "frame": 200, "hop": 80, "bands": 20, "low_hz": 50}, "std": 2}'
    settings = from_mapping(msgspec.to_builtins(msgspec.json.decode(text, type=project.Preprocess)))
    assert settings == Preprocess(log_mel=SOUND, std=2.0)


def test_fields_are_those_of_deploy_toml_in_the_same_order() -> None:
    assert list(Preprocess.__dataclass_fields__) == list(project.Preprocess.__struct_fields__)
    assert list(LogMel.__dataclass_fields__) == list(project.LogMel.__struct_fields__)
    assert list(Size.__dataclass_fields__) == list(project.Resize.__struct_fields__)


def test_input_is_left_as_it_was() -> None:
    raw = np.ones((2, 3, 4, 4), dtype=np.float32)
    result = apply(Preprocess(), raw)
    result += 1
    assert (raw == 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"scal": 1.0},
        {"scale": "1"},
        {"scale": True},
        {"scale": math.nan},
        {"std": 0.0},
        {"std": [1.0, 0.0]},
        {"mean": []},
        {"layout": "hwc"},
        {"resize": {"height": 0, "width": 4}},
        {"resize": {"height": 2.5, "width": 4}},
        {"resize": {"height": 2}},
        {"resize": 4},
        {"log-mel": {"sample_rate": 8000, "frame": 200, "hop": 80, "bands": 20, "fft": 100}},
        {"log-mel": {"sample_rate": 8000, "frame": 200, "hop": 80, "bands": 20, "high_hz": 5000.0}},
        {"log-mel": {"sample_rate": 8000, "frame": 200, "hop": 80, "bands": 20, "floor": 0.0}},
        {"log-mel": {"sample_rate": 8000, "frame": 200, "hop": 0, "bands": 20}},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        from_mapping(settings)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (Preprocess(crop=Size(height=9, width=2)), (1, 3, 8, 8)),
        (Preprocess(resize=Size(height=9, width=2)), (1, 8, 8)),
        (Preprocess(layout="nhwc-to-nchw"), (1, 8, 8)),
        (Preprocess(mean=(0.1, 0.2)), (1, 3, 8, 8)),
        (Preprocess(mean=(0.1, 0.2)), (5,)),
        (Preprocess(log_mel=SOUND), (1, 199)),
        (Preprocess(log_mel=SOUND), (1, 1, 400)),
        (Preprocess(log_mel=LogMel(sample_rate=8000, frame=32, hop=16, bands=40)), (1, 400)),
    ],
)
def test_data_that_does_not_fit_is_refused(settings: Preprocess, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        apply(settings, np.zeros(shape, dtype=np.float32))


def test_text_and_complex_data_are_refused() -> None:
    for array in (np.array([["a"]]), np.ones((1, 2), dtype=np.complex64)):
        with pytest.raises(UsageError, match="dtype"):
            apply(Preprocess(), array)


def _log_mel_by_hand(samples: np.ndarray) -> np.ndarray:
    """Step by step with plain sums: frame 200, hop 80, fft 256, 8 kHz, 20 bands from 50 Hz to 4 kHz."""
    low, high = 2595 * math.log10(1 + 50 / 700), 2595 * math.log10(1 + 4000 / 700)
    edges = [700 * (10 ** ((low + (high - low) * i / 21) / 2595) - 1) for i in range(22)]
    n = np.arange(200)
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * i / 200) for i in range(200)])
    result = np.empty((len(samples), 11, 20))
    for row, sound in enumerate(samples.astype(np.float64)):
        for frame in range(11):
            piece = sound[80 * frame : 80 * frame + 200] * window
            power = [abs(np.sum(piece * np.exp(-2j * np.pi * k * n / 256))) ** 2 for k in range(129)]
            for band in range(20):
                left, centre, right = edges[band : band + 3]
                total = 0.0
                for k in range(129):
                    hz = k * 8000 / 256
                    if left < hz <= centre:
                        total += power[k] * (hz - left) / (centre - left)
                    elif centre < hz < right:
                        total += power[k] * (right - hz) / (right - centre)
                result[row, frame, band] = math.log(max(total, 1e-6))
    return result
