"""NNCF's accuracy control: tried where plain int8 costs accuracy, and it names what it left float."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from deploy.cli.main import run
from deploy.manifest import Manifest, Rung
from exporters.base import CONTROLLED, Quantization, find_exporter
from exporters.capture import capture
from exporters.onnx import OnnxModel, to_onnx
from targets.errors import ModelError

SPEC = TensorSpec(name="image", shape=("batch", 3, 8, 8), bounds={"batch": (1, 64)})
MODEL = '''
import torch
from torch import Tensor, nn


class OutlierChannel(nn.Module):
    """One channel of `wild` is 3000 times the others: a range for all of them leaves these no levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wild = nn.Conv2d(16, 16, 3, padding=1)
        self.calm = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.wild.weight[0] *= 3000
            self.calm.weight[:, 0] /= 10 * 3000
            images = torch.randn(256, 3, 8, 8)
            self.head.bias -= self(images).mean(dim=0)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(self.calm(torch.relu(self.wild(x))))
        return self.head(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    return OutlierChannel()
'''


def outlier_channel(text: str = MODEL) -> nn.Module:
    scope: dict[str, Any] = {}
    exec(text, scope)  # the project's model.py is this text
    module: nn.Module = scope["build"]()
    return module.eval()


def images(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 3, 8, 8)).astype(np.float32)


def answers(module: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        scores: Tensor = module(torch.from_numpy(image))
    return scores.numpy()


@pytest.fixture
def source(tmp_path: Path) -> OnnxModel:
    return to_onnx(capture(outlier_channel(), [SPEC]), tmp_path / "source.onnx")


def test_the_harmful_operator_stays_float_and_is_named_the_same_each_time(
    source: OnnxModel, tmp_path: Path
) -> None:
    exporter, reached, written = find_exporter("openvino"), {}, []
    image = images(16, seed=9)
    for turn, variant in (("plain", ""), ("one", CONTROLLED), ("two", CONTROLLED)):
        (tmp_path / turn).mkdir()
        artifact = exporter.export(
            source,
            precision="int8",
            calibration=[{"image": images(16, seed)} for seed in range(4)],
            quantization=Quantization(variant=variant, least_snr_db=15),
            file=tmp_path / turn / "model.xml",
        )
        session = exporter.open(artifact.file, inputs=[SPEC], outputs=["output"], threads=1)
        reached[turn] = snr_db(answers(outlier_channel(), image), session.run({"image": image})["output"])
        written.append([file.read_bytes() for file in (artifact.file, *artifact.companions)])
    assert reached["one"] >= max(reached["plain"], 15) + 6
    assert artifact.delegated is not None
    assert "calm" in [left.module for left in artifact.delegated.left]
    assert artifact.delegated.delegated > 0
    assert written[1] == written[2]


def test_a_single_batch_cannot_be_held_back(source: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hold back calibration samples"):
        find_exporter("openvino").export(
            source,
            precision="int8",
            calibration=[{"image": images(16)}],
            quantization=Quantization(variant=CONTROLLED),
            file=tmp_path / "model.xml",
        )


def project(folder: Path, source: str, module: nn.Module) -> dict[str, Rung]:
    """The rungs of a build whose data are labelled by the model itself."""
    seen, unseen = images(128, seed=1), images(400, seed=2)
    labels = answers(module, unseen).argmax(axis=1)
    np.savez(folder / "calibration.npz", image=seen)
    np.savez(folder / "evaluation.npz", image=unseen, label=labels)
    (folder / "deploy.toml").write_text(
        f'[model]\nsource = "{source}"\nname = "net"\n[inputs.image]\nshape = ["batch", 3, 8, 8]\n'
        '[inputs.image.dynamic.batch]\nmin = 1\nmax = 64\n[prune]\npattern = "none"\n'
        '[calibration]\nsource = "calibration.npz"\n[evaluate]\nsource = "evaluation.npz"\nmax_drop = 0.1\n'
    )
    assert run(["build", "-c", str(folder), "--target", "host", "--runtime", "openvino", "-q"]) == 0
    manifest = folder / "build" / "net" / "host" / "manifest.json"
    return {rung.name: rung for rung in msgspec.json.decode(manifest.read_bytes(), type=Manifest).rungs}


def test_a_foreign_model_that_int8_breaks_gets_a_controlled_rung_that_keeps_accuracy(tmp_path: Path) -> None:
    to_onnx(capture(outlier_channel(), [SPEC]), tmp_path / "model.onnx")
    rungs = project(tmp_path, "model.onnx", outlier_channel())
    assert rungs["dense-int8"].dropped is not None
    controlled = rungs["dense-int8-controlled"]
    assert controlled.dropped is None
    assert controlled.accuracy.verdict != "missed"
    assert controlled.delegation is not None
    assert ("Convolution", "node_conv2d_2") in [(x.operator, x.module) for x in controlled.delegation.left]
    assert controlled.delegation.delegated > 0
    assert "dense-int8-qdq-controlled" not in rungs


def test_a_mixed_rung_that_ships_spares_the_minutes(tmp_path: Path) -> None:
    text = MODEL.replace("3000", "30")
    (tmp_path / "model.py").write_text(text)
    rungs = project(tmp_path, "model.py:build", outlier_channel(text))
    assert rungs["dense-int8"].dropped is not None
    assert rungs["dense-int8-mixed"].dropped is None
    assert not [name for name in rungs if name.endswith(CONTROLLED)]


def test_agreement_is_of_the_batches_that_are_asked_for(
    source: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf
    import openvino

    from exporters.accuracy_control import HELD_BACK, quantize_controlled

    seen: dict[str, Any] = {}

    def control(model: Any, learned: Any, held: Any, agreement: Any, **options: Any) -> Any:
        seen.update(items=list(held.get_data()), agreement=agreement)
        return model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", control)
    sizes = [8] * (2 * HELD_BACK)
    sizes[HELD_BACK + 1] = 3  # the second batch that is held back is a partial one
    batches = [{"image": images(size, seed)} for seed, size in enumerate(sizes)]
    core = openvino.Core()
    model = core.read_model(str(source.file))
    quantize_controlled(model, batches, least_snr_db=0.0, plain=lambda learned: model, settings={})
    whole = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [len(item["image"]) for item in seen["items"]] == [8, 3]
    for items in ([seen["items"][1]], [seen["items"][0]], seen["items"], seen["items"][::-1]):
        assert seen["agreement"](whole, items)[0] > 60
