"""What every exporter promises, in every precision it offers, in its own runtime."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oddities import TwoInputs, settled
from torch import Tensor, nn

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from exporters.base import EXPORTERS, Artifact, Exporter, Form, Quantization, find_exporter, int8_variants
from exporters.capture import Captured, capture
from exporters.isolated.environment import prepare
from exporters.onnx import OnnxModel, to_onnx
from exporters.remote import RemoteSession
from targets.errors import IntegrityError, ModelError

LEAST_DB = {"float32": 80, "float16": 45, "bfloat16": 30, "int8": 15, "int8-dynamic": 15, "int4": 10}
SPECS = (
    TensorSpec(name="image", shape=("batch", 3, 8, 8), bounds={"batch": (1, 20)}),
    TensorSpec(name="facts", shape=("batch", 6), bounds={"batch": (1, 20)}),
)
CASES = [
    (runtime, precision, variant)
    for runtime in EXPORTERS
    for precision in find_exporter(runtime).precisions
    for variant in (int8_variants(runtime) if precision == "int8" else ("",))
]


class TwoAnswers(nn.Module):
    """Two inputs, and a dictionary of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = settled(TwoInputs)

    def forward(self, image: Tensor, facts: Tensor) -> dict[str, Tensor]:
        logits = self.inner(image, facts)
        return {"logits": logits, "best": logits.amax(dim=1)}


@dataclass(frozen=True, kw_only=True)
class Made:
    """An exported case."""

    artifact: Artifact
    module: nn.Module
    precision: str


def ready(runtime: str) -> Exporter:
    """The exporter, its environment made where it has one of its own."""
    if EXPORTERS[runtime].isolated:
        prepare(runtime)
    return find_exporter(runtime)


def batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {s.name: generator.standard_normal(s.sizes(batch=size)).astype(np.float32) for s in SPECS}


def wanted(module: nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        answers = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in answers.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[Form, Captured | OnnxModel]]:
    module = TwoAnswers().eval()
    captured = capture(module, SPECS)
    model = to_onnx(captured, tmp_path_factory.mktemp("onnx") / "model.onnx")
    return module, {Form.GRAPH: captured, Form.ONNX: model}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(filter(None, case)) for case in CASES])
def made(
    request: pytest.FixtureRequest,
    sources: tuple[nn.Module, dict[Form, Captured | OnnxModel]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    runtime, precision, variant = request.param
    module, forms = sources
    exporter = ready(runtime)
    artifact = exporter.export(
        forms[EXPORTERS[runtime].accepts],
        precision=precision,
        calibration=[batch(16, seed) for seed in range(4)],
        quantization=Quantization(variant=variant),
        file=tmp_path_factory.mktemp("artifact") / f"model{exporter.suffix}",
    )
    return Made(artifact=artifact, module=module, precision=precision)


@pytest.fixture(scope="module")
def session(made: Made) -> Iterator[RemoteSession]:
    with opened(made.artifact) as session:
        yield session


def opened(artifact: Artifact, file: Path | None = None, *, threads: int = 1) -> RemoteSession:
    return RemoteSession(
        artifact.runtime, file or artifact.file, inputs=SPECS, outputs=["logits", "best"], threads=threads
    )


def test_a_quantized_model_says_which_products_run_on_integers(made: Made) -> None:
    delegated = made.artifact.delegated
    if made.precision == "int8":
        assert delegated is not None
        assert 0 < delegated.delegated <= delegated.operators
        missing = delegated.operators - delegated.delegated
        tells_only_the_share = EXPORTERS[made.artifact.runtime].isolated
        assert len(delegated.left) == (min(1, missing) if tells_only_the_share else missing)
        assert all(left.why for left in delegated.left)


@pytest.mark.parametrize("size", [1, 2, 20, 3])
def test_outputs_are_the_modules_at_every_batch(made: Made, session: RemoteSession, size: int) -> None:
    inputs = batch(size, seed=100 + size)
    answers, right = session.run(inputs), wanted(made.module, inputs)
    assert list(answers) == ["logits", "best"]
    for name, array in answers.items():
        assert array.shape == right[name].shape
        assert array.dtype == np.float32
        assert snr_db(right[name], array) >= LEAST_DB[made.precision]


def test_inputs_go_by_name_and_not_by_order(session: RemoteSession) -> None:
    inputs = batch(2)
    turned = dict(reversed(inputs.items()))
    assert np.array_equal(session.run(inputs)["logits"], session.run(turned)["logits"])


def test_arrays_that_are_not_contiguous_give_the_same_answer(session: RemoteSession) -> None:
    inputs = batch(4)
    image = np.ascontiguousarray(inputs["image"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not image.flags.c_contiguous
    assert np.array_equal(session.run(inputs)["logits"], session.run({**inputs, "image": image})["logits"])


def test_answers_stay_when_the_next_call_comes(session: RemoteSession) -> None:
    first = session.run(batch(2, seed=1))["logits"]
    kept = first.copy()
    session.run(batch(2, seed=2))
    assert np.array_equal(first, kept)


def test_a_wrong_dtype_and_a_missing_input_are_told(session: RemoteSession) -> None:
    inputs = batch(2)
    with pytest.raises(ModelError, match="image has the wrong dtype"):
        session.run({**inputs, "image": inputs["image"].astype(np.float64)})
    with pytest.raises(ModelError, match="facts"):
        session.run({"image": inputs["image"]})


def test_a_wrong_shape_is_told_and_the_session_lives_on(session: RemoteSession) -> None:
    inputs = batch(2)
    with pytest.raises(ModelError, match="image has the wrong shape"):
        session.run({**inputs, "image": inputs["image"][:, :2]})
    with pytest.raises(ModelError, match="batch from 1 to 20"):
        session.run(batch(21))
    assert session.run(inputs)["logits"].shape == (2, 10)


def test_threads_can_be_set_and_change_no_answer(made: Made, session: RemoteSession) -> None:
    inputs = batch(8)
    before = session.run(inputs)["logits"]
    session.set_threads(2)
    after = session.run(inputs)["logits"]
    session.set_threads(1)
    assert snr_db(before, after) >= 80


def test_prepared_calls_can_be_timed(session: RemoteSession) -> None:
    session.prepare(batch(1))
    samples = session.time(5)
    assert len(samples) == 5
    assert all(sample > 0 for sample in samples)


def test_the_files_work_in_another_folder(made: Made, session: RemoteSession, tmp_path: Path) -> None:
    for file in (made.artifact.file, *made.artifact.companions):
        shutil.copy(file, tmp_path / f"renamed{file.suffix}")
    inputs = batch(2)
    with opened(made.artifact, tmp_path / f"renamed{made.artifact.file.suffix}") as again:
        assert np.array_equal(again.run(inputs)["logits"], session.run(inputs)["logits"])


def test_a_damaged_file_is_told(made: Made, tmp_path: Path) -> None:
    file = tmp_path / made.artifact.file.name
    file.write_bytes(made.artifact.file.read_bytes()[:100])
    for companion in made.artifact.companions:
        shutil.copy(companion, tmp_path)
    with pytest.raises(IntegrityError, match=file.name):
        opened(made.artifact, file)


def test_no_folder_of_this_machine_is_in_the_files(made: Made) -> None:
    for file in (made.artifact.file, *made.artifact.companions):
        assert str(Path(__file__).parent).encode() not in file.read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()


@pytest.mark.parametrize("runtime", EXPORTERS)
def test_the_same_source_gives_the_same_bytes_and_asks_no_network(
    runtime: str,
    sources: tuple[nn.Module, dict[Form, Captured | OnnxModel]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments}")

    exporter, written = ready(runtime), []
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for turn in ("one", "two"):
        (tmp_path / turn).mkdir()
        artifact = exporter.export(
            sources[1][EXPORTERS[runtime].accepts],
            precision="int8",
            calibration=[batch(16, seed) for seed in range(2)],
            quantization=Quantization(),
            file=tmp_path / turn / f"model{exporter.suffix}",
        )
        written.append([file.read_bytes() for file in (artifact.file, *artifact.companions)])
    assert written[0] == written[1]


class Depthwise(nn.Module):
    """A product that one of the quantizers may leave float."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.each = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.each(torch.relu(self.wide(image)))).mean(dim=(2, 3)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_layer_that_stays_float_is_named_by_its_module(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = SPECS[0]
    captured = capture(Depthwise().eval(), [spec])
    source = to_onnx(captured, tmp_path / "source.onnx")
    assert set(source.modules.values()) >= {"wide", "each", "head"}
    exporter = find_exporter(runtime)
    artifact = exporter.export(
        source,
        precision="int8",
        calibration=[{"image": batch(16, seed)["image"]} for seed in range(2)],
        quantization=Quantization(keep_float=("each",)),
        file=tmp_path / f"model{exporter.suffix}",
    )
    assert artifact.delegated is not None
    assert "each" in [left.module for left in artifact.delegated.left]
    assert not {"wide", "head"} & {left.module for left in artifact.delegated.left}


def test_convolutions_alone_have_no_int4(tmp_path: Path) -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor) -> Tensor:
            return self.only(image).mean(dim=(2, 3))

    source = to_onnx(capture(Convolutions().eval(), [SPECS[0]]), tmp_path / "source.onnx")
    with pytest.raises(ModelError, match="no matrix product with constant weights"):
        find_exporter("onnxruntime").export(
            source, precision="int4", calibration=[], quantization=Quantization(), file=tmp_path / "m.onnx"
        )
    assert not (tmp_path / "m.onnx").exists()


class Clashing(nn.Module):
    """Its input and outputs are called as values inside are; one output is the input, one is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, relu: Tensor) -> dict[str, Tensor]:
        found = self.embedding(relu.relu()).sum(dim=1)
        return {"embedding": found + 1, "sum_1": found, "again": found, "same": relu}


def test_names_that_stand_inside_the_graph_already_are_kept_apart(tmp_path: Path) -> None:
    spec = TensorSpec(name="relu", shape=("batch", 3), dtype="int64", bounds={"batch": (1, 4)})
    module = Clashing().eval()
    captured = capture(module, [spec])
    names = [output.name for output in captured.outputs]
    assert names == ["embedding", "sum_1", "again", "same"]
    source = to_onnx(captured, tmp_path / "source.onnx")
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    right = wanted(module, {"relu": tokens})
    for runtime in ("onnxruntime", "openvino"):
        exporter = find_exporter(runtime)
        file = tmp_path / f"model{exporter.suffix}"
        exporter.export(source, precision="float32", calibration=[], quantization=Quantization(), file=file)
        with RemoteSession(runtime, file, inputs=[spec], outputs=names, threads=1) as session:
            answers = session.run({"relu": tokens})
        for name in names:
            np.testing.assert_allclose(answers[name], right[name], rtol=1e-5)
