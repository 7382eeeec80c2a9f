"""DeepSparse in a build: masks that its kernels skip, proven; and everything that can go wrong with it."""

import inspect
import itertools
import json
import os
import platform
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from oddities import settled
from onnx import helper, numpy_helper
from torch import nn

import deploy
from calibration.compare import snr_db
from calibration.spec import TensorSpec
from deploy.building import Build
from deploy.cli.main import run
from deploy.manifest import SparseExecution
from deploy.pipeline import Pipeline
from deploy.pruning.masks import apply_, magnitude_masks
from deploy.validation.zeros import time_zeros
from exporters.base import Quantization, find_exporter
from exporters.capture import capture
from exporters.deepsparse import accept_, dense_twin
from exporters.isolated.environment import ENVIRONMENTS, prepare
from exporters.onnx import OnnxModel, to_onnx
from exporters.remote import RemoteSession
from targets.errors import IntegrityError, MissingRequirementError, ModelError, WrongOutputsError

pytestmark = [
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the engine is x86 Linux's"
    ),
    pytest.mark.xdist_group("deepsparse"),
]
SPEC = TensorSpec(name="image", shape=("batch", 16, 14, 14), bounds={"batch": (1, 16)})


class Convolutions(nn.Module):
    """Wide enough for zeros to pay: four convolutions, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 128, 256, 256, 128)
        self.body = nn.Sequential(
            *(
                layer
                for before, after in itertools.pairwise(widths)
                for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
            )
        )
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def masked() -> nn.Module:
    torch.manual_seed(0)
    module = Convolutions().eval()
    apply_(module, magnitude_masks(module, sparsity=0.9, ranking="global", exclude=()))
    return module


@pytest.fixture(scope="module")
def source(masked: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return to_onnx(capture(masked, [SPEC]), tmp_path_factory.mktemp("onnx") / "model.onnx")


def batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"image": generator.standard_normal((size, 16, 14, 14)).astype(np.float32)}


def export(source: OnnxModel, precision: str, file: Path) -> Path:
    prepare("deepsparse")
    exporter = find_exporter("deepsparse")
    calibration = [batch(8, seed) for seed in range(2)]
    exporter.export(
        source, precision=precision, calibration=calibration, quantization=Quantization(), file=file
    )
    return file


def opened(file: Path, **options: float) -> RemoteSession:
    return RemoteSession("deepsparse", file, inputs=[SPEC], outputs=["output"], threads=1, **options)


def zeros_of(file: Path) -> dict[str, float]:
    """The share of zeros in each weight of more than 1,000 numbers."""
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    return {str(array.shape): float((array == 0).mean()) for array in tensors if array.size > 1000}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_zeros_stay_zeros_in_the_file_and_the_whole_graph_is_taken(
    source: OnnxModel, masked: nn.Module, precision: str, tmp_path: Path
) -> None:
    file = export(source, precision, tmp_path / "model.onnx")
    before, after = zeros_of(source.file), zeros_of(file)
    assert all(after[shape] >= share for shape, share in before.items() if share > 0.5)
    assert max(after.values()) > 0.8
    with opened(file) as session:
        assert session.supported_fraction() > 0.9
        for size in (1, 16, 3):
            inputs = batch(size, seed=9)
            with torch.no_grad():
                right = masked(torch.from_numpy(inputs["image"])).numpy()
            assert snr_db(right, session.run(inputs)["output"]) >= (80 if precision == "float32" else 15)


def test_a_dense_twin_differs_in_its_zeros_alone(source: OnnxModel, tmp_path: Path) -> None:
    file, twin = export(source, "float32", tmp_path / "model.onnx"), tmp_path / "twin.onnx"
    dense_twin(file, twin)
    assert max(zeros_of(twin).values()) < 0.01
    for old, new in zip(
        onnx.load(str(file)).graph.initializer, onnx.load(str(twin)).graph.initializer, strict=True
    ):
        before, after = numpy_helper.to_array(old), numpy_helper.to_array(new)
        assert np.array_equal(before[before != 0], after[before != 0])


@pytest.mark.parametrize(
    ("objective", "interval", "drops"),
    [("latency", [0.97, 1.05], True), ("latency", [1.8, 2.0], False), ("size", [0.97, 1.05], False)],
)
def test_a_rung_whose_zeros_bring_nothing_is_dropped_but_where_storage_is_the_goal(
    objective: str, interval: list[float], drops: bool
) -> None:
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.bench = SimpleNamespace(plan=SimpleNamespace(objective=objective))
    told = pipeline._unskipped(SparseExecution(gain=sum(interval) / 2, ci95=interval, batch=1))
    assert ("zeros are not skipped: 1.01x" in (told or "")) == drops
    assert pipeline._unskipped(None) is None


def test_the_rewritten_graph_answers_the_same(source: OnnxModel) -> None:
    import onnxruntime

    model = onnx.load(str(source.file))
    accept_(model)
    kinds = [node.op_type for node in model.graph.node]
    assert "GlobalAveragePool" in kinds
    assert "ReduceMean" not in kinds
    onnx.checker.check_model(model, full_check=True)
    inputs = batch(3)
    answers = [
        onnxruntime.InferenceSession(each).run(None, inputs)[0]
        for each in (source.file.read_bytes(), model.SerializeToString())
    ]
    assert snr_db(*answers) > 100


class Pooled(Convolutions):
    """The same with the layers that other networks end in: axes from the end, and a view."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.adaptive_avg_pool2d(self.body(image), 1).flatten(1))


def test_other_ways_to_end_a_network_are_taken_whole(tmp_path: Path) -> None:
    model = to_onnx(capture(settled(Pooled), [SPEC]), tmp_path / "source.onnx")
    file = export(model, "float32", tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert kinds[-3:] == ["GlobalAveragePool", "Flatten", "Gemm"]
    with opened(file) as session:
        assert session.supported_fraction() == 1


def test_a_graph_that_the_engine_refuses_costs_its_rung_alone(
    source: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> RemoteSession:
        raise IntegrityError("model.onnx is no model that DeepSparse compiles", found="NM: error")

    monkeypatch.setattr("exporters.remote.RemoteSession", refused)
    with pytest.raises(ModelError, match="does not compile the graph"):
        export(source, "float32", tmp_path / "model.onnx")


def test_inputs_of_different_batches_are_refused(tmp_path: Path) -> None:
    other = TensorSpec(name="fact", shape=(1,), bounds={})
    source = OnnxModel(file=tmp_path / "none.onnx", inputs=(SPEC, other), modules={})
    with pytest.raises(ModelError, match="share their first dimension"):
        find_exporter("deepsparse").export(
            source, precision="float32", calibration=(), quantization=Quantization(), file=tmp_path / "m.onnx"
        )


def test_a_mean_over_something_else_stays_as_it_is() -> None:
    axes = numpy_helper.from_array(np.array([1]), "axes")
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)
    value = helper.make_tensor_value_info("x", 1, [1, 2, 3, 4])
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", 1, None)], [axes])
    model = helper.make_model(graph)
    accept_(model)
    assert [each.op_type for each in model.graph.node] == ["ReduceMean"]


def test_a_dynamic_dimension_beside_the_batch_is_refused(tmp_path: Path) -> None:
    spec = TensorSpec(
        name="image", shape=("batch", 16, "height", 14), bounds={"batch": (1, 4), "height": (14, 28)}
    )
    source = OnnxModel(file=tmp_path / "none.onnx", inputs=(spec,), modules={})
    with pytest.raises(ModelError, match="the dynamic dimension height"):
        find_exporter("deepsparse").export(
            source, precision="float32", calibration=(), quantization=Quantization(), file=tmp_path / "m.onnx"
        )


def test_an_engine_that_crashes_or_hangs_is_told_and_takes_nobody_along(
    source: OnnxModel, tmp_path: Path
) -> None:
    file = export(source, "float32", tmp_path / "model.onnx")
    with opened(file) as session:
        os.kill(session._process.pid, signal.SIGKILL)
        with pytest.raises(WrongOutputsError, match="SIGKILL"):
            session.run(batch(1))
    with opened(file, timeout_s=3) as session:
        os.kill(session._process.pid, signal.SIGSTOP)
        with pytest.raises(WrongOutputsError, match="hangs"):
            session.run(batch(1))
    with opened(file) as session:
        assert np.isfinite(session.run(batch(1))["output"]).all()


PROJECT = """
[model]
source = "model.py:build"
[inputs.image]
shape = ["batch", 16, 14, 14]
dynamic.batch = { min = 1, max = 8 }
[calibration]
source = "calibration.npz"
[evaluate]
source = "evaluation.npz"
max_drop = 1.0
[prune]
sparsity = 0.9
[quantize]
precision = "float32"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project around the convolutions, as a user would have it."""
    folder = tmp_path_factory.mktemp("project") / "wide"
    folder.mkdir()
    head = "import itertools\nimport torch\nfrom torch import nn\n\n"
    build = "\ndef build():\n    torch.manual_seed(0)\n    return Convolutions()\n"
    (folder / "model.py").write_text(head + inspect.getsource(Convolutions) + build)
    (folder / "deploy.toml").write_text(PROJECT)
    images, labels = batch(64)["image"], np.arange(64) % 10
    np.savez(folder / "calibration.npz", image=images[:32])
    np.savez(folder / "evaluation.npz", image=images[32:], label=labels[32:])
    return folder


@pytest.fixture(scope="module")
def built(project: Path) -> Build:
    return deploy.build(project, target="xeon", licences=["deepsparse"])


def test_an_accepted_licence_brings_masked_rungs_that_prove_their_zeros(built: Build) -> None:
    manifest = built.manifest
    assert manifest.licences == ["deepsparse"]
    assert any("not production" in warning and "June 2025" in warning for warning in manifest.warnings)
    rung = next(rung for rung in manifest.rungs if rung.name == "deepsparse/pruned-float")
    assert (rung.pattern, rung.sparsity) == ("unstructured", pytest.approx(0.9, abs=1e-3))
    zeros = rung.sparse_execution
    assert zeros is not None
    assert (rung.dropped is None) == (zeros.ci95[0] > 1)
    assert [rung.name for rung in manifest.rungs if rung.pattern == "unstructured"] == [rung.name]
    assert sum(layer.zeros for layer in built.report.masks) == round(
        0.9 * sum(layer.weights for layer in built.report.masks)
    )
    assert "its zeros bring" in (built.folder / "report.html").read_text()


def test_without_the_licence_the_plan_takes_the_next_row_and_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "-c", str(project), "--target", "xeon", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["runtime"], plan["pattern"]) == ("openvino", "structured")
    assert any("--accept-license deepsparse" in refusal["instead"] for refusal in plan["refused"])
    assert run(["build", "-c", str(project), "--target", "xeon", "--runtime", "deepsparse"]) == 2
    assert "not production" in capsys.readouterr().err


def test_an_engine_that_cannot_be_installed_drops_its_rungs_and_the_others_go_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    absent = replace(
        ENVIRONMENTS["deepsparse"], requirements=(f"no-such-engine==1 --hash=sha256:{'0' * 64}",)
    )
    monkeypatch.setitem(ENVIRONMENTS, "deepsparse", absent)
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    built = deploy.build(project, target="xeon", licences=["deepsparse"], output_dir=tmp_path)
    dropped = {r.name: r.dropped for r in built.manifest.rungs if r.name.startswith("deepsparse")}
    assert all(why and "cannot be made" in why for why in dropped.values())
    assert not built.manifest.shipped_rung.startswith("deepsparse")
    with pytest.raises(MissingRequirementError, match="cannot be made"):
        deploy.build(
            project,
            target="xeon",
            licences=["deepsparse"],
            output_dir=tmp_path,
            runtime="deepsparse",
            ladder=False,
        )


class Clock:
    """A session whose calls take what it is told, in turn."""

    def __init__(self, *nanoseconds: int) -> None:
        self._times = itertools.cycle(nanoseconds)

    def prepare(self, inputs: object) -> None:
        pass

    def time(self, calls: int) -> list[int]:
        return [next(self._times)] * calls


@pytest.mark.parametrize(("sparse", "proven"), [((5_000_000,), True), ((10_000_000,), False)])
def test_zeros_are_judged_by_the_ratio_to_dense_weights(sparse: tuple[int, ...], proven: bool) -> None:
    found = time_zeros(Clock(*sparse), Clock(10_000_000, 9_800_000, 10_300_000), batch(1))
    assert (found.ci95[0] > 1) == proven
    assert found.gain == pytest.approx(2 if proven else 1, rel=0.03)
    assert found.batch == 1


def test_a_server_neither_holds_nor_packs_it(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.bundling.server import server_bundle
    from deploy.serving.loading import load

    proven = SparseExecution(gain=2.0, ci95=[1.9, 2.1], batch=1)
    monkeypatch.setattr("deploy.validation.zeros.time_zeros", lambda *arguments: proven)
    only = deploy.build(
        built.folder.parents[2],
        target="xeon",
        licences=["deepsparse"],
        runtime="deepsparse",
        ladder=False,
        output_dir=built.folder.parents[1] / "only",
        use_cache=False,
    )
    assert only.manifest.runtime == "deepsparse"
    with pytest.raises(MissingRequirementError, match="cannot be served"):
        load(only.folder)
    with pytest.raises(MissingRequirementError, match="not for production"):
        server_bundle(only.folder)
    assert run(["validate", str(only.folder), "--device", "host"]) == 0
