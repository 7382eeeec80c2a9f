"""deploy init finds the factory, inputs that really run, and what lies beside the model."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploy.initialise import initialise, parse_input
from deploy.inspection import find_factory, inspect_model
from deploy.project import load
from targets.errors import ModelError, UsageError

HEAD = "import torch\nfrom torch import nn\n"
LINEAR = (
    HEAD
    + "def build() -> nn.Module:\n    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))\n"
)


def model(folder: Path, text: str, name: str = "model.py") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def inputs_of(folder: Path, text: str) -> dict[str, tuple[list[int | str], str]]:
    initialise(model(folder, text))
    return {spec.name: (list(spec.shape), spec.dtype) for spec in load(folder).specs()}


def test_an_annotated_function_is_the_factory(tmp_path: Path) -> None:
    model(tmp_path, LINEAR + "class Net(nn.Module):\n    pass\n")
    assert find_factory("model.py", tmp_path) == "model.py:build"


def test_a_function_without_annotation_is_recognised_without_being_called(tmp_path: Path) -> None:
    text = HEAD + "class Net(nn.Module):\n    pass\ndef small():\n    open('called', 'w')\n    return Net()\n"
    model(tmp_path, text)
    assert find_factory("model.py", tmp_path) == "model.py:small"
    assert not (tmp_path / "called").exists()
    assert not Path("called").exists()


def test_a_class_without_required_arguments_is_the_factory_where_no_function_is(tmp_path: Path) -> None:
    text = "class Net(nn.Module):\n    def __init__(self, width=3):\n        super().__init__()\n"
    text += "class Block(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
    model(tmp_path, HEAD + text)
    assert find_factory("model.py", tmp_path) == "model.py:Net"


def test_training_functions_are_no_factories(tmp_path: Path) -> None:
    model(tmp_path, LINEAR + "def train() -> nn.Module:\n    raise SystemExit('trained')\n")
    assert find_factory("model.py", tmp_path) == "model.py:build"


def test_several_factories_are_listed_with_the_command_that_takes_one(tmp_path: Path) -> None:
    model(tmp_path, LINEAR + "def other() -> nn.Module:\n    return build()\n")
    with pytest.raises(UsageError, match=r"build, other.*deploy init model.py:build") as raised:
        initialise(tmp_path / "model.py")
    assert raised.value.exit_code == 2
    assert initialise(f"{tmp_path}/model.py:other").source == "model.py:other"


def test_a_file_without_factory_says_what_one_is(tmp_path: Path) -> None:
    model(tmp_path, "WIDTH = 3\n")
    with pytest.raises(UsageError, match="holds no factory"):
        initialise(tmp_path / "model.py")


def test_a_strided_first_convolution_is_tried_on_large_pictures_first(tmp_path: Path) -> None:
    body = "nn.Conv2d(3, 8, 7, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)"
    text = f"{HEAD}def build() -> nn.Module:\n    return nn.Sequential({body})\n"
    assert inputs_of(tmp_path, text) == {"input": (["batch", 3, 224, 224], "float32")}
    assert "run too; write what it was trained on" in (tmp_path / "deploy.toml").read_text()


def test_the_picture_size_that_fits_the_classifier_is_found(tmp_path: Path) -> None:
    body = "nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)"
    text = f"{HEAD}def build() -> nn.Module:\n    return nn.Sequential({body})\n"
    assert inputs_of(tmp_path, text) == {"input": (["batch", 1, 28, 28], "float32")}


def test_tokens_become_integers(tmp_path: Path) -> None:
    text = """
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 2)
    def forward(self, input_ids, attention_mask):
        weight = attention_mask.unsqueeze(-1).float()
        return self.head((self.embed(input_ids) * weight).sum(1))
"""
    expected = (["batch", 128], "int64")
    assert inputs_of(tmp_path, HEAD + text) == {"input_ids": expected, "attention_mask": expected}


def test_two_float_inputs_of_different_widths_are_told_apart(tmp_path: Path) -> None:
    text = """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(7, 4)
    def forward(self, left, right):
        return self.a(left) + self.b(right)
"""
    found = inputs_of(tmp_path, HEAD + text)
    assert found == {"left": (["batch", 5], "float32"), "right": (["batch", 7], "float32")}


def test_a_recurrent_model_gets_frames(tmp_path: Path) -> None:
    text = """
class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(12, 8, batch_first=True)
    def forward(self, frames):
        return self.rnn(frames)[0][:, -1]
"""
    assert inputs_of(tmp_path, HEAD + text) == {"frames": (["batch", 32, 12], "float32")}


def test_a_docstring_that_names_the_shape_is_believed_when_it_runs(tmp_path: Path) -> None:
    text = """
class Any(nn.Module):
    '''Logits (batch, 5) for pictures (batch, 3, 20, 24).'''
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))
"""
    assert inputs_of(tmp_path, HEAD + text) == {"x": (["batch", 3, 20, 24], "float32")}


def test_a_model_that_takes_one_batch_only_gets_a_fixed_one(tmp_path: Path) -> None:
    text = """
class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
    def forward(self, x):
        return self.head(x.reshape(2, 6))
"""
    assert inputs_of(tmp_path, HEAD + text) == {"x": ([2, 6], "float32")}


def test_no_fitting_input_asks_for_one(tmp_path: Path) -> None:
    text = "class Odd(nn.Module):\n    def forward(self, x):\n        raise ValueError('never')\n"
    with pytest.raises(ModelError, match=r"--input x:batch"):
        initialise(model(tmp_path, HEAD + text))
    assert not (tmp_path / "deploy.toml").exists()


def test_a_given_input_is_used_and_a_wrong_one_is_the_users_line(tmp_path: Path) -> None:
    file = model(tmp_path, LINEAR)
    initialise(file, inputs=["features:batch,6:float32"])
    assert load(tmp_path).specs()[0].shape == ("batch", 6)
    with pytest.raises(ModelError, match="forward raised on its example"):
        initialise(file, inputs=["features:batch,5:float32"], force=True)


@pytest.mark.parametrize("text", ["image", "image:", ":3,4", "image:batch,,3", "image:3,4:complex64"])
def test_an_input_that_does_not_parse_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_input(text)


def test_shapes_may_be_written_with_crosses() -> None:
    assert parse_input("image:1x3x8x8").shape == (1, 3, 8, 8)
    assert parse_input("x:batch,6:int64").shape == ("batch", 6)


def test_an_existing_file_stays_unless_forced(tmp_path: Path) -> None:
    file = model(tmp_path, LINEAR)
    (tmp_path / "deploy.toml").write_text("mine = true\n")
    with pytest.raises(UsageError, match="--force"):
        initialise(file)
    assert (tmp_path / "deploy.toml").read_text() == "mine = true\n"
    initialise(file, force=True)
    assert tomllib.loads((tmp_path / "deploy.toml").read_text())["model"]["source"] == "model.py:build"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = initialise(model(tmp_path, LINEAR), dry_run=True)
    assert not done.file.exists()
    assert 'source = "model.py:build"' in done.text


def test_the_file_may_lie_above_the_model_and_not_beside_another(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = model(tmp_path / "src", LINEAR)
    assert initialise(file, output=tmp_path).source == "src/model.py:build"
    with pytest.raises(UsageError, match="does not hold"):
        initialise(file, output=tmp_path / "elsewhere")


def test_the_weights_that_fit_are_chosen_and_others_named(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    save_file(module.state_dict(), tmp_path / "good.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "bad.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"no zip")
    done = initialise(model(tmp_path, LINEAR))
    assert done.weights == "good.safetensors"
    assert any("bad.safetensors was left out" in note for note in done.notes)
    assert any("broken.pt was left out" in note for note in done.notes)


def test_data_beside_the_model_fills_the_tables_where_it_fits(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    good = {"features": noise.normal(size=(40, 6)).astype("float32"), "label": noise.integers(0, 3, 40)}
    np.savez(tmp_path / "calibration.npz", features=good["features"])
    np.savez(tmp_path / "val.npz", **good)
    np.savez(tmp_path / "test.npz", **good)
    np.savez(tmp_path / "train.npz", features=noise.normal(size=(40, 7)), label=good["label"])
    done = initialise(model(tmp_path, LINEAR))
    assert done.data["calibration"] == "calibration.npz"
    assert {done.data["evaluate"], done.data["report"]} == {"val.npz", "test.npz"}
    assert "recover" not in done.data
    assert any("train.npz was left out" in note for note in done.notes)
    assert [spec.name for spec in load(tmp_path).specs()] == ["features"]


def test_labels_outside_the_classes_leave_accuracy_unmeasured(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", x=noise.normal(size=(40, 6)).astype("float32"), label=np.full(40, 7))
    done = initialise(model(tmp_path, LINEAR))
    assert "evaluate" not in done.data
    assert load(tmp_path).tables.evaluate is None


def test_without_data_calibration_is_called_synthetic(tmp_path: Path) -> None:
    initialise(model(tmp_path, LINEAR))
    project = load(tmp_path)
    assert project.tables.calibration is not None
    assert project.tables.calibration.source == "synthetic"
    assert "int8 ranges are guesses" in (tmp_path / "deploy.toml").read_text()


def test_hostile_names_stay_inside_their_comment(tmp_path: Path) -> None:
    folder = tmp_path / 'a"b ü'
    folder.mkdir()
    text = HEAD + "class D(nn.Linear):\n    def __init__(self): super().__init__(6, 3)\n"
    text += "    def forward(self, input): return {'x\\n[evil]\\ny = ': super().forward(input)}\n"
    initialise(model(folder, text))
    assert load(folder).name == 'a"b ü'
    assert "evil" not in tomllib.loads((folder / "deploy.toml").read_text())


def test_the_inspection_names_the_outputs_of_a_dictionary() -> None:
    class Pair(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x), "norm": x.norm(dim=1)}

    seen = inspect_model(Pair(4, 2), Path(), arrays={}, inputs=[])
    assert dict(seen.outputs) == {"logits": (2, 2), "norm": (2,)}
