"""The search for the first wrong module where runtimes start from ONNX, on models broken by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from calibration.dataset import synthetic
from calibration.spec import TensorSpec
from deploy.cli.main import run
from deploy.validation.bisect import Case, Finding, UnclearError, bisect
from deploy.validation.onnx_values import telling
from exporters.base import Quantization, find_exporter
from exporters.capture import capture
from exporters.onnx import OnnxModel, to_onnx

SPEC = TensorSpec(name="image", shape=("batch", 2, 8, 8), bounds={"batch": (1, 4)})
RUNTIMES = ("onnxruntime", "openvino")
LEAST = {"float32": 80.0, "int8": 15.0}

Break = Callable[[onnx.ModelProto], None]


class Branches(nn.Module):
    """A stem with batch-norm, a right branch behind a residual one, an operator in several nodes, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Conv2d(8, 8, 1)
        self.beside = nn.Conv2d(8, 8, 3, padding=1)
        self.smooth = nn.GELU(approximate="tanh")
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = self.smooth(self.middle(x)) + self.beside(x)
        return self.head(torch.relu(x).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    made = Branches()
    made.stem[1].running_mean.normal_()
    made.stem[1].running_var.uniform_(0.5, 2)
    return made.eval()


@pytest.fixture(scope="module")
def source(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return to_onnx(capture(module, [SPEC]), tmp_path_factory.mktemp("onnx") / "model.onnx")


def leaky(model: onnx.ModelProto) -> None:
    """The first Relu lets a tenth of what is negative through."""
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "LeakyRelu"
    node.attribute.append(onnx.helper.make_attribute("alpha", 0.1))


def turned(name: str) -> Break:
    """The sign of a weight is turned."""

    def break_(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), name))

    return break_


def unscaled(model: onnx.ModelProto) -> None:
    """The mean becomes a sum."""
    node = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    node.op_type = "ReduceSum"


def broken(source: OnnxModel, breaks: Break, folder: Path) -> OnnxModel:
    model = onnx.load(str(source.file))
    breaks(model)
    onnx.save(model, str(folder / "broken.onnx"))
    return replace(source, file=folder / "broken.onnx")


def batches() -> list[dict[str, np.ndarray]]:
    return list(synthetic([SPEC], samples=16, seed=1).batches(4))


def case_of(
    module: nn.Module, source: OnnxModel, made_from: OnnxModel, runtime: str, precision: str, folder: Path
) -> Case:
    exporter = find_exporter(runtime)
    artifact = exporter.export(
        made_from,
        precision=precision,
        calibration=batches(),
        quantization=Quantization(),
        file=folder / f"artifact{exporter.suffix}",
    )
    return Case(
        module=module,
        data=synthetic([SPEC], samples=8, seed=0),
        sizes=[1, 2, 4],
        runtime=runtime,
        precision=precision,
        least_snr_db=LEAST[precision],
        artifact=artifact.file,
        inputs=["image"],
        outputs=["output"],
        output_names=[],
        calibration=batches(),
        quantization=Quantization(),
        threads=1,
        onnx=source,
    )


def told(found: Finding) -> Sequence[Any]:
    return found.stage, found.place.module, found.place.operator


CASES = [
    (leaky, "stem.2", "LeakyRelu"),
    (turned("middle.weight"), "middle", "Conv"),
    (turned("beside.weight"), "beside", "Conv"),
    (turned("head.weight"), "head", "Gemm"),
    (unscaled, "", "ReduceSum"),
]


@pytest.mark.parametrize(("breaks", "path", "operator"), CASES, ids=[case[1] or "forward" for case in CASES])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_wrong_conversion_names_its_module_and_operator(
    runtime: str,
    breaks: Break,
    path: str,
    operator: str,
    module: nn.Module,
    source: OnnxModel,
    tmp_path: Path,
) -> None:
    wrong = broken(source, breaks, tmp_path)
    found = bisect(case_of(module, wrong, wrong, runtime, "float32", tmp_path))
    assert told(found) == ("convert", path, operator)
    assert (path or "the forward of the model itself") in found.sentence


@pytest.mark.parametrize(("precision", "path"), [("float32", "middle"), ("int8", "beside")])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_wrong_artifact_of_a_right_conversion_names_its_module(
    runtime: str, precision: str, path: str, module: nn.Module, source: OnnxModel, tmp_path: Path
) -> None:
    wrong = broken(source, turned(f"{path}.weight"), tmp_path)
    found = bisect(case_of(module, source, wrong, runtime, precision, tmp_path))
    assert (found.stage, found.place.module) == ("artifact", path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_right_artifact_is_called_unclear_and_never_blamed(
    runtime: str, module: nn.Module, source: OnnxModel, tmp_path: Path
) -> None:
    with pytest.raises(UnclearError, match="the outputs agree"):
        bisect(case_of(module, source, source, runtime, "float32", tmp_path))


def test_a_foreign_model_names_the_node_whose_artifact_is_wrong(source: OnnxModel, tmp_path: Path) -> None:
    from deploy import foreign

    module = foreign.load_module(source.file, [SPEC])
    nodes = replace(source, modules={name: name for name in source.modules})
    wrong = broken(source, turned("beside.weight"), tmp_path)
    case = case_of(module, nodes, wrong, "openvino", "float32", tmp_path)
    found = bisect(replace(case, traceable=False))
    (node,) = [name for name, path in source.modules.items() if path == "beside"]
    assert told(found) == ("artifact", node, "Conv")


MODEL = """
import torch
from torch import nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
"""


def test_a_build_says_which_module_of_the_user_became_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporters import onnx as exporting

    honest = exporting._strip_

    def breaking(model: onnx.ModelProto) -> None:
        honest(model)
        leaky(model)

    monkeypatch.setattr(exporting, "_strip_", breaking)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "deploy.toml").write_text(
        '[model]\nsource = "model.py:build"\nname = "net"\n[inputs.image]\nshape = [1, 2, 8, 8]\n'
        '[prune]\npattern = "none"\n'
    )
    words = ["--target", "host", "--runtime", "onnxruntime", "-q"]
    assert run(["build", "-c", str(tmp_path), *words]) == 5
    error = capsys.readouterr().err
    assert "the first stage to differ is convert" in error
    assert "first in 1 (LeakyRelu)" in error


def test_a_mask_does_not_drown_the_numbers_beside_it() -> None:
    masked = np.array([-1e9, 1.0, 2.0], np.float32)
    one, other = telling(masked, masked + np.array([0, 1, 0], np.float32))
    assert one.tolist() == [1.0, 2.0]
    assert other.tolist() == [2.0, 2.0]
    assert telling(masked, masked)[0].size == 0
