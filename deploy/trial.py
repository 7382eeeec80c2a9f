"""A two-layer model lowered and run, to show that an exporter works on this machine."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from deploy.manifest import Value
from exporters.base import EXPORTERS, Form, Quantization, find_exporter
from exporters.capture import Captured, capture
from exporters.remote import RemoteSession
from targets.errors import WrongOutputsError

if TYPE_CHECKING:
    from exporters.onnx import OnnxModel

MIN_SNR_DB = 80.0  # what a float32 rung must reach
INPUT = TensorSpec(name="x", shape=(1, 8), dtype="float32", bounds={})


class Trial(Value, frozen=True, kw_only=True):
    """What a trial run showed: how well outputs agree, in dB, and how long lowering and running took."""

    runtime: str
    snr_db: float
    seconds: float


class TwoLayers(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 8) to (1, 4)."""
        outputs: torch.Tensor = self.second(torch.relu(self.first(x)))
        return outputs


def try_exporter(runtime: str) -> Trial:
    """Lowers the model in this process and runs it in one of its own.

    Raises a DeployError where the exporter cannot work or the outputs differ from the module's.
    """
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TwoLayers().eval()
        x = torch.randn(1, 8)
    with torch.no_grad():
        wanted = module(x).numpy()
    got = _lower_and_run(runtime, module, x.numpy())
    agreement = snr_db(wanted, got)
    if not agreement >= MIN_SNR_DB:
        raise WrongOutputsError(
            f"{runtime} ran a two-layer model and answered wrongly",
            found=f"{agreement:.1f} dB",
            expected=f"at least {MIN_SNR_DB:g} dB",
        )
    return Trial(runtime=runtime, snr_db=agreement, seconds=time.monotonic() - started)


def _lower_and_run(
    runtime: str, module: nn.Module, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    captured = capture(module, [INPUT])
    exporter = find_exporter(runtime)
    outputs = [output.name for output in captured.outputs]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"trial{exporter.suffix}"
        source: Captured | OnnxModel = captured
        if EXPORTERS[runtime].accepts is Form.ONNX:
            from exporters.onnx import to_onnx

            source = to_onnx(captured, Path(folder) / "source.onnx")
        exporter.export(
            source,
            precision="float32",
            calibration=[{INPUT.name: x}],
            quantization=Quantization(),
            file=file,
        )
        with RemoteSession(runtime, file, inputs=captured.inputs, outputs=outputs, threads=1) as session:
            return session.run({INPUT.name: x})[outputs[0]]
