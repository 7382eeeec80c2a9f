"""Models too large for one ONNX file, at so low a limit that tiny ones are: the weights stay found."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from deploy import foreign
from deploy.bundling import server
from deploy.bundling.modelserver import triton_files
from deploy.cli.main import run
from deploy.manifest import Manifest
from deploy.serving.loading import load
from exporters import external_data
from exporters.base import Quantization, find_exporter
from exporters.capture import capture
from exporters.onnx import OnnxModel, to_onnx
from exporters.remote import RemoteSession
from targets.errors import ModelError

SPEC = TensorSpec(name="features", shape=("batch", 32), bounds={"batch": (1, 16)})
CASES = [
    ("onnxruntime", "float32", "", 80),
    ("onnxruntime", "int8", "", 15),
    ("onnxruntime", "int8-dynamic", "", 15),
    ("onnxruntime", "int4", "", 10),
    ("openvino", "float32", "", 80),
    ("openvino", "int8", "", 15),
    ("openvino", "int8", "qdq", 15),
]


class Perceptron(nn.Module):
    """Two linear layers of more than a kilobyte each."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(features)))


@pytest.fixture(autouse=True)
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any weight is too much for the model's own file."""
    monkeypatch.setattr(external_data, "LARGEST_BYTES", 0)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron().eval()


@pytest.fixture
def source(module: nn.Module, tmp_path: Path) -> OnnxModel:
    (tmp_path / "source").mkdir()
    return to_onnx(capture(module, [SPEC]), tmp_path / "source" / "model.onnx")


def features(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 32)).astype(np.float32)


def names(files: Sequence[Path]) -> list[str]:
    return sorted(file.name for file in files)


def test_weights_go_beside_the_model_which_names_them(source: OnnxModel) -> None:
    (data,) = source.companions
    assert names(list(source.file.parent.iterdir())) == names([source.file, data])
    stored = onnx.load(str(source.file), load_external_data=False)
    places = {
        entry.value for t in stored.graph.initializer for entry in t.external_data if entry.key == "location"
    }
    assert places == {data.name}
    assert data.name.startswith("model-")
    assert source.file.stat().st_size < 5000 < data.stat().st_size


@pytest.mark.parametrize(("runtime", "precision", "variant", "least_db"), CASES)
def test_every_precision_answers_from_another_folder_under_another_name_with_the_same_bytes(
    runtime: str,
    precision: str,
    variant: str,
    least_db: float,
    source: OnnxModel,
    module: nn.Module,
    tmp_path: Path,
) -> None:
    exporter, written = find_exporter(runtime), []
    for turn in ("one", "two"):
        (tmp_path / turn).mkdir()
        artifact = exporter.export(
            source,
            precision=precision,
            calibration=[{"features": features(16, seed)} for seed in range(2)],
            quantization=Quantization(variant=variant),
            file=tmp_path / turn / f"model{exporter.suffix}",
        )
        files = [artifact.file, *artifact.companions]
        assert len(files) == 2
        assert names(files) == names(list((tmp_path / turn).iterdir()))
        written.append([(file.name, file.read_bytes()) for file in files])
    assert written[0] == written[1]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in files:
        own = file.stem == artifact.file.stem
        shutil.copy(file, moved / (f"renamed{file.suffix}" if own else file.name))
    shutil.rmtree(source.file.parent)
    with RemoteSession(
        runtime, moved / f"renamed{exporter.suffix}", inputs=[SPEC], outputs=["output"], threads=1
    ) as session:
        answer = session.run({"features": features(4, 9)})["output"]
    with torch.no_grad():
        right = module(torch.from_numpy(features(4, 9))).numpy()
    assert snr_db(right, answer) >= least_db


def test_a_small_model_keeps_its_weights(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, tmp_path: Path
) -> None:
    monkeypatch.setattr(external_data, "LARGEST_BYTES", 2_000_000_000)
    source = to_onnx(capture(module, [SPEC]), tmp_path / "model.onnx")
    assert source.companions == ()
    assert names(list(tmp_path.iterdir())) == ["model.onnx"]


MODEL = """
import torch
from torch import nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
"""


def project(folder: Path, model: str) -> Path:
    """A project of the features, labelled by the sign of the first."""
    data = features(256)
    np.savez(folder / "calibration.npz", features=data[:64])
    np.savez(folder / "evaluation.npz", features=data[64:], label=(data[64:, 0] > 0).astype(np.int64))
    (folder / "deploy.toml").write_text(
        f'[model]\nsource = "{model}"\nname = "net"\n[inputs.features]\nshape = ["batch", 32]\n'
        '[inputs.features.dynamic.batch]\nmin = 1\nmax = 16\n[prune]\npattern = "none"\n'
        '[calibration]\nsource = "calibration.npz"\n[evaluate]\nsource = "evaluation.npz"\nmax_drop = 1.0\n'
    )
    return folder


def built(folder: Path, *words: str) -> tuple[Path, Manifest]:
    assert run(["build", "-c", str(folder), "--target", "host", "-q", *words]) == 0
    build = folder / "build" / "net" / "host"
    return build, msgspec.json.decode((build / "manifest.json").read_bytes(), type=Manifest)


def test_a_build_is_published_validated_served_and_laid_out_for_other_servers(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    build, manifest = built(project(tmp_path, "model.py:build"), "--runtime", "onnxruntime", "--keep-rungs")
    program, data = manifest.files[:2]
    assert (program.role, data.role) == ("program", "weights")
    assert (build / data.path).is_file()
    assert (build / "rungs" / data.path).is_file()
    assert program.size_bytes + data.size_bytes == next(
        rung.size_bytes for rung in manifest.rungs if rung.name == manifest.shipped_rung
    )
    assert run(["validate", str(build)]) == 0
    model = load(build)
    assert model is not None
    assert {f"model/{program.path}", f"model/{data.path}"} <= server._model_files(build, manifest).keys()
    layout = triton_files(build, manifest)
    assert {"net/1/model.onnx", f"net/1/{data.path}"} < layout.keys()


def foreign_network(folder: Path) -> Path:
    """A product whose weights lie in "w.bin" from an offset on, as another tool wrote them."""
    matrix = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32)
    (folder / "w.bin").write_bytes(bytes(64) + matrix.tobytes())
    tensor = numpy_helper.from_array(matrix, "matrix")
    set_external_data(tensor, "w.bin", offset=64, length=matrix.nbytes)
    tensor.ClearField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "matrix"], ["scores"])],
        "net",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 16])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_a_foreign_model_with_external_data_builds_and_its_weights_are_published(tmp_path: Path) -> None:
    foreign_network(tmp_path)
    build, manifest = built(project(tmp_path, "model.onnx"), "--keep-rungs")
    rungs = {rung.name: rung for rung in manifest.rungs}
    assert rungs["onnxruntime/dense-float"].parity is not None
    assert rungs["onnxruntime/dense-float"].parity.snr_db > 80
    assert {rung.dropped for rung in manifest.rungs if "float" in rung.name} == {None}
    (data,) = (build / "rungs").glob("model-*.data")
    assert data.stat().st_size == 32 * 16 * 4


@pytest.mark.parametrize(("key", "value"), [("offset", "4096"), ("length", "100"), ("offset", "-1")])
def test_external_data_that_lie_about_their_extent_are_refused(tmp_path: Path, key: str, value: str) -> None:
    file = foreign_network(tmp_path)
    model = onnx.load(str(file), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="do not fit 'matrix'"):
        foreign.read(file)


def test_planning_asks_a_foreign_model_for_its_inputs_alone(tmp_path: Path) -> None:
    file = foreign_network(tmp_path)
    (tmp_path / "w.bin").unlink()
    assert foreign.default_inputs(file)["features"]["shape"] == ["batch", 32]
