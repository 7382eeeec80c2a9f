"""`source = "model.onnx"`: a foreign model builds like one of torch, and a hostile one is refused first."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.spec import TensorSpec
from deploy import foreign
from deploy.cli.main import run
from targets.errors import ModelError, UsageError

Model = onnx.ModelProto
RNG = np.random.default_rng(0)


def network(*, opset: int = 17, weights: np.ndarray | None = None, batch: str | int = "N") -> Model:
    """A convolution, a ReLU, a mean and a linear layer: (batch, 3, 8, 8) to (batch, 4)."""
    kernel = RNG.standard_normal((8, 3, 3, 3)).astype(np.float32) if weights is None else weights
    matrix = RNG.standard_normal((8, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["picture", "kernel"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "matrix"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(matrix, "matrix")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project around the network, with data whose labels the network itself gives."""
    project = tmp_path / "net"
    project.mkdir()
    model = network()
    onnx.save(model, project / "model.onnx")
    pictures = RNG.standard_normal((128, 3, 8, 8)).astype(np.float32)
    spec = foreign.default_inputs(project / "model.onnx")
    assert spec["picture"]["shape"] == ["batch", 3, 8, 8]
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    labels = session.run(None, {"picture": pictures})[0].argmax(axis=1)
    np.savez(project / "calibration.npz", picture=pictures[:64])
    np.savez(project / "evaluation.npz", picture=pictures[64:], label=labels[64:])
    (project / "deploy.toml").write_text(
        '[model]\nsource = "model.onnx"\n[calibration]\nsource = "calibration.npz"\n'
        '[evaluate]\nsource = "evaluation.npz"\nmax_drop = 0.1\n'
    )
    return project


def test_a_foreign_model_builds_and_competes(folder: Path) -> None:
    assert run(["build", "-c", str(folder), "--target", "host", "-q"]) == 0
    manifest = json.loads((folder / "build" / "net" / "host" / "manifest.json").read_text())
    rungs = {rung["name"]: rung for rung in manifest["rungs"]}
    assert {"onnxruntime/dense-float", "onnxruntime/dense-int8", "openvino/dense-int8-qdq"} <= rungs.keys()
    assert manifest["inputs"][0]["shape"] == ["batch", 3, 8, 8]
    assert manifest["outputs"][0]["name"] == "scores"
    dense = rungs["onnxruntime/dense-float"]
    assert dense["parity"]["snr_db"] > 80
    assert dense["macs"] == 8 * 8 * 8 * 3 * 9 + 8 * 4
    assert dense["parameters"] == 8 * 3 * 9 + 8 * 4
    assert any("nothing is pruned" in warning for warning in manifest["warnings"])


def test_structured_pruning_is_refused_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", "-c", str(folder), "--target", "host", "--pattern", "structured", "--sparsity", "0.3"]
    assert run(words) == 2
    told = capsys.readouterr().err
    assert "structured pruning of an ONNX model is refused" in told
    assert "torch model" in told
    assert not (folder / "build").exists()


def test_a_phone_takes_it_by_a_runtime_that_reads_onnx(folder: Path) -> None:
    assert run(["plan", "-c", str(folder), "--target", "galaxy-s22", "--json"]) == 0
    assert run(["plan", "-c", str(folder), "--target", "galaxy-s22", "--runtime", "executorch"]) == 2


def test_init_writes_a_project_that_builds_for_the_target_it_suggests(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "deploy.toml").unlink()
    assert run(["init", str(folder / "model.onnx")]) == 0
    assert "next: deploy build --target host" in capsys.readouterr().out
    assert "galaxy" not in (folder / "deploy.toml").read_text()
    words = ["--runtime", "onnxruntime", "--no-ladder", "-q"]
    assert run(["build", "-c", str(folder), "--target", "host", *words]) == 0


def test_an_old_opset_is_brought_to_one_that_quantizes_by_channel(tmp_path: Path) -> None:
    onnx.save(network(opset=11), tmp_path / "old.onnx")
    specs = specs_of(tmp_path / "old.onnx")
    model = foreign.prepared(tmp_path / "old.onnx", specs)
    assert model.opset_import[0].version == 13


def specs_of(file: Path) -> tuple[foreign.TensorSpec, ...]:
    return tuple(
        foreign.TensorSpec(
            name=name,
            shape=tuple(table["shape"]),
            dtype=table["dtype"],
            bounds={size: (b["min"], b["max"]) for size, b in table["dynamic"].items()},
        )
        for name, table in foreign.default_inputs(file).items()
    )


def truncated(model: Model, file: Path) -> None:
    file.write_bytes(model.SerializeToString()[:-300])


def no_model(model: Model, file: Path) -> None:
    file.write_bytes(b"not a model at all" * 10)


def empty(model: Model, file: Path) -> None:
    file.write_bytes(b"")


def future_opset(model: Model, file: Path) -> None:
    model.opset_import[0].version = 999
    file.write_bytes(model.SerializeToString())


def own_domain(model: Model, file: Path) -> None:
    model.opset_import.append(helper.make_opsetid("com.acme.secret", 1))
    file.write_bytes(model.SerializeToString())


def cycle(model: Model, file: Path) -> None:
    model.graph.node[0].input[0] = "b"
    file.write_bytes(model.SerializeToString())


def missing_input(model: Model, file: Path) -> None:
    model.graph.node[1].input[0] = "nobody"
    file.write_bytes(model.SerializeToString())


def unknown_operator(model: Model, file: Path) -> None:
    model.graph.node[1].op_type = "Frobnicate"
    file.write_bytes(model.SerializeToString())


def lying_size(model: Model, file: Path) -> None:
    model.graph.initializer[0].dims[0] = 2**40
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (truncated, ""),
        (no_model, "no ONNX model"),
        (empty, "holds no graph"),
        (future_opset, "unknown opset"),
        (own_domain, "com.acme.secret"),
        (cycle, "no valid ONNX model"),
        (missing_input, "no valid ONNX model"),
        (unknown_operator, "no valid ONNX model"),
        (lying_size, "no valid ONNX model"),
    ],
)
def test_a_damaged_model_is_refused(
    folder: Path,
    break_it: Callable[[Model, Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(network(), folder / "model.onnx")
    assert run(["build", "-c", str(folder), "--target", "host", "-q"]) == 4
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def with_external(folder: Path, location: str, *, name: str = "model.onnx") -> Path:
    """The network with its kernel in another file, which the model says lies at `location`."""
    model = network()
    onnx.save(model, folder / name, save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(str(folder / name), load_external_data=False)
    for tensor in stored.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / name).write_bytes(stored.SerializeToString())
    return folder / name


def test_external_data_beside_the_model_is_read_and_counts_for_the_hash(tmp_path: Path) -> None:
    file = with_external(tmp_path, "weights.bin")
    assert len(foreign.read(file).graph.initializer) == 2
    before = foreign.fingerprint(file)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(bytes(data))
    assert foreign.fingerprint(file) != before


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(10_000))
    location = str(tmp_path / "secret.bin") if location == "ABSOLUTE" else location
    file = with_external(inside, location)
    with pytest.raises(ModelError, match="outside the model's folder"):
        foreign.read(file)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "missing"])
def test_external_data_that_is_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    file = with_external(inside, "weights.bin")
    secret = tmp_path / "secret.bin"
    (inside / "weights.bin").replace(secret)
    if kind == "symlink":
        (inside / "weights.bin").symlink_to(secret)
    elif kind == "hard link":
        os.link(secret, inside / "weights.bin")
    with pytest.raises(ModelError, match=r"is a link|hard link|is missing"):
        foreign.read(file)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ('[inputs.image]\nshape = ["batch", 3, 8, 8]', "expected picture"),
        ('[inputs.picture]\nshape = ["batch", 3, 9, 8]', "picture"),
        ('[inputs.picture]\nshape = ["batch", 3, 8]', "picture"),
        ('[inputs.picture]\nshape = ["batch", 3, 8, 8]\ndtype = "int64"', "float32"),
    ],
)
def test_inputs_that_are_not_the_models_are_told(
    folder: Path, inputs: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "deploy.toml"
    config.write_text(f"{config.read_text()}{inputs}\n")
    assert run(["build", "-c", str(folder), "--target", "host", "-q"]) == 2
    assert words in capsys.readouterr().err


def test_outputs_that_are_not_there_and_weights_beside_a_whole_model_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "deploy.toml"
    config.write_text(f"{config.read_text()}[outputs.nothing]\n")
    assert run(["build", "-c", str(folder), "--target", "host", "-q"]) == 2
    assert "outputs of model.onnx: scores" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is missing"):
        foreign.read(folder / "none.onnx")


def test_a_runtime_that_lacks_an_operator_is_dropped_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["square", "matrix"], ["a"]),
            helper.make_node("Det", ["a"], ["b"]),
            helper.make_node("Unsqueeze", ["b", "axes"], ["size"]),
        ],
        "det",
        [helper.make_tensor_value_info("square", TensorProto.FLOAT, ["N", 3, 3])],
        [helper.make_tensor_value_info("size", TensorProto.FLOAT, ["N", 1])],
        [
            numpy_helper.from_array(np.eye(3, dtype=np.float32) * 2, "matrix"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    squares = RNG.standard_normal((64, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", square=squares)
    (tmp_path / "deploy.toml").write_text(
        '[model]\nsource = "model.onnx"\nname = "det"\n[calibration]\nsource = "calibration.npz"\n'
    )
    assert run(["build", "-c", str(tmp_path), "--target", "host", "-q"]) == 0
    manifest = json.loads((tmp_path / "build" / "det" / "host" / "manifest.json").read_text())
    dropped = {rung["name"]: rung["dropped"] for rung in manifest["rungs"]}
    assert manifest["runtime"] == "onnxruntime"
    assert "Det" in dropped["openvino/dense-float"]
    assert dropped["onnxruntime/dense-float"] is None


def test_weight_masks_thin_a_foreign_model_and_are_kept_through_quantization(folder: Path) -> None:
    model = wide_network()
    onnx.save(model, folder / "model.onnx")
    words = [
        "--runtime",
        "onnxruntime",
        "--pattern",
        "unstructured",
        "--sparsity",
        "0.6",
        "--objective",
        "size",
    ]
    found = run(["build", "-c", str(folder), "--target", "host", "-q", "--keep-rungs", *words])
    assert found == 0
    build = folder / "build" / "net" / "host"
    report = json.loads((build / "report.json").read_text())
    assert [(layer["layer"], layer["weights"], layer["zeros"]) for layer in report["masks"]] == [
        ("Conv_2", 8 * 8 * 9, round(0.6 * 8 * 8 * 9))
    ]
    rungs = {rung["name"]: rung for rung in report["manifest"]["rungs"]}
    assert rungs["pruned-int8"]["pattern"] == "unstructured"
    assert rungs["pruned-int8"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    for name in ("pruned-float", "pruned-int8"):
        (file,) = (build / "rungs").glob(f"{name}-*.onnx")
        tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
        inner = next(array for array in tensors if array.shape == (8, 8, 3, 3))
        assert int((inner == 0).sum()) >= round(0.6 * 8 * 8 * 9)


def wide_network() -> Model:
    """The network with a second convolution, which a mask may thin."""
    model = network()
    kernel = RNG.standard_normal((8, 8, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernel, "inner"))
    model.graph.node.insert(2, helper.make_node("Conv", ["b", "inner"], ["b2"], pads=[1, 1, 1, 1]))
    model.graph.node[3].input[0] = "b2"
    return model


def test_a_node_without_a_name_gets_one_that_no_other_has(folder: Path) -> None:
    model = network()
    model.graph.node[1].name = "Conv_0"  # what the first node would be called
    onnx.save(model, folder / "model.onnx")
    specs = project_specs(folder)
    names = [node.name for node in foreign.prepared(folder / "model.onnx", specs).graph.node]
    assert len(set(names)) == len(names)
    foreign.load_module(folder / "model.onnx", specs)


def test_a_plan_says_of_each_runtime_why_it_is_not_pruned(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "deploy.toml").open("a") as writing:
        writing.write('[recover]\nsource = "calibration.npz"\n')
    words = ["plan", "-c", str(folder), "--target", "xeon", "--accept-license", "deepsparse", "--json"]
    assert run(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["pattern"], "recover" in [step["name"] for step in plan["steps"]]) == ("unstructured", False)
    assert any(note.startswith("openvino, onnxruntime: nothing is pruned") for note in plan["notes"])
    assert any("not recovered" in note for note in plan["notes"])


def project_specs(folder: Path) -> tuple[TensorSpec, ...]:
    from deploy.project import load

    return load(folder).specs()
