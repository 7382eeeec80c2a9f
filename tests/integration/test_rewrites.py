"""Traps of ExecuTorch 1.4.1 and torchao 0.18, with the rewrites that answer them, in the real runtime."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from exporters.base import Quantization
from exporters.capture import capture
from exporters.executorch import ExecuTorchExporter
from exporters.remote import RemoteSession
from targets.errors import ModelError

PICTURE = TensorSpec(name="x", shape=("batch", 1, 8, 8), bounds={"batch": (1, 16)})
ROWS = TensorSpec(name="x", shape=("batch", 8, 8), bounds={"batch": (1, 16)})


class Forward(nn.Module):
    """Layers and a function over them."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def noise(spec: TensorSpec, batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(spec.sizes(batch=batch)).astype("float32")


def run_at(
    module: nn.Module, spec: TensorSpec, precision: str, batches: tuple[int, ...], file: Path
) -> list[float]:
    """The SNR of the program against the module at each batch, in this order, in one session."""
    captured = capture(module, [spec])
    calibration = [{"x": noise(spec, 16, seed)} for seed in range(4)]
    ExecuTorchExporter().export(
        captured, precision=precision, calibration=calibration, quantization=Quantization(), file=file
    )
    found = []
    with RemoteSession("executorch", file, inputs=[spec], outputs=["output"], threads=1) as session:
        for batch in batches:
            inputs = noise(spec, batch, 100 + batch)
            with torch.no_grad():
                wanted = module(torch.from_numpy(inputs)).numpy()
            found.append(snr_db(wanted, session.run({"x": inputs})["output"]))
    return found


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_largest_batch_is_the_declared_one_and_not_fifteen(tmp_path: Path) -> None:
    module = Forward(lambda layers, x: layers[0](x).relu().flatten(1), nn.Conv2d(1, 4, 3)).eval()
    assert min(run_at(module, PICTURE, "float32", (1, 15, 16, 2), tmp_path / "m.pte")) > 80


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean(dim=(2, 3)),
        lambda x: x.mean(dim=(2, 3), keepdim=True).flatten(1),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: nn.AdaptiveAvgPool2d(1)(x).flatten(1),
    ],
    ids=["mean", "mean-keepdim", "adaptive-pool", "adaptive-pool-module"],
)
def test_an_int8_mean_survives_a_batch_that_grows(pool: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    module = Forward(
        lambda layers, x: layers[1](pool(layers[0](x).relu())),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.Linear(32, 10),
    ).eval()
    assert min(run_at(module, PICTURE, "int8", (1, 16, 1, 16, 2, 16), tmp_path / "m.pte")) > 20


def test_a_float_mean_goes_into_the_delegate(tmp_path: Path) -> None:
    module = Forward(lambda layers, x: layers[0](x).mean(dim=(2, 3)), nn.Conv2d(1, 8, 3)).eval()
    artifact = ExecuTorchExporter().export(
        capture(module, [PICTURE]), precision="float32", calibration=[], quantization=Quantization(),
        file=tmp_path / "m.pte",
    )  # fmt: skip
    assert artifact.delegated is not None
    assert "aten.mean.dim" not in [left.operator for left in artifact.delegated.left]


def test_a_layer_called_twice_is_right_in_int8(tmp_path: Path) -> None:
    def twice(layers: nn.ModuleList, x: Tensor) -> Tensor:
        return layers[0](torch.tanh(layers[0](x)) * 4)

    module = Forward(twice, nn.Linear(8, 8)).eval()
    assert min(run_at(module, ROWS, "int8", (1, 16), tmp_path / "m.pte")) > 25


def recurrent(layers: nn.ModuleList, x: Tensor) -> Tensor:
    def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(row + layers[1](state))
        return state, state.clone()

    rows = layers[0](x).transpose(0, 1)
    last, every = scan(step, x.new_zeros(x.shape[0], 8), rows)
    return last + every.sum(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "least"), [("float32", 80), ("int8", 20)])
def test_scan_is_right_at_every_batch(precision: str, least: float, tmp_path: Path) -> None:
    module = Forward(recurrent, nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    assert min(run_at(module, ROWS, precision, (1, 3, 16), tmp_path / "m.pte")) > least


@pytest.mark.filterwarnings("ignore")
def test_map_is_right_at_every_batch(tmp_path: Path) -> None:
    def rows(layers: nn.ModuleList, x: Tensor) -> Tensor:
        return map_rows(lambda row: torch.relu(row * 2.0) + 1.0, layers[0](x).transpose(0, 1)).sum(0)

    module = Forward(rows, nn.Linear(8, 4)).eval()
    assert min(run_at(module, ROWS, "float32", (1, 3, 16), tmp_path / "m.pte")) > 80


@pytest.mark.filterwarnings("ignore")
def test_a_scan_too_long_to_write_out_is_refused_with_a_dynamic_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.rewrites.MAX_UNROLLED_NODES", 4)
    module = Forward(recurrent, nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    with pytest.raises(ModelError, match="dynamic batch"):
        run_at(module, ROWS, "float32", (1,), tmp_path / "m.pte")


def test_arithmetic_on_token_numbers_stays_integer_in_int8(tmp_path: Path) -> None:
    spec = TensorSpec(name="x", shape=("batch", 8), dtype="int64", bounds={"batch": (1, 4)})

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x + 2))

    module = Shifted().eval()
    tokens = np.random.default_rng(0).integers(0, 12, (4, 8))
    ExecuTorchExporter().export(
        capture(module, [spec]), precision="int8", calibration=[{"x": tokens}], quantization=Quantization(),
        file=tmp_path / "m.pte",
    )  # fmt: skip
    with RemoteSession("executorch", tmp_path / "m.pte", inputs=[spec], outputs=["o"], threads=1) as session:
        answer = session.run({"x": tokens})["o"]
    with torch.no_grad():
        assert snr_db(module(torch.from_numpy(tokens)).numpy(), answer) > 25
