"""Each real project is sound before any build: its weights fit, its accuracy is the published one."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deploy.project import ProjectTables

HERE = Path(__file__).parent
NAMES = sorted(folder.name for folder in (HERE / "projects").iterdir() if (folder / "deploy.toml").exists())

# The published or measured accuracy less twice its standard error on so few samples.
ACCURACY_FLOORS = {
    "resnet20": 0.89,  # published 0.9173, 500 images
    "resnet56": 0.91,  # published 0.9339
    "resnet8": 0.85,  # published: at least 0.85
    "ds_cnn": 0.82,  # a speaker that training never heard
    "cond": 0.95,
    "scan": 0.93,
    "lstm": 0.92,
    "dict_output": 0.95,
}


@pytest.fixture
def load(
    preparation: ModuleType, real_project: Callable[[str], Path]
) -> Callable[[str], tuple[Path, nn.Module]]:
    """A project's folder and its module with its weights, in evaluation mode."""

    def loaded(name: str) -> tuple[Path, nn.Module]:
        work = real_project(name)
        module = preparation.load_file(work / "model.py").build()
        weights = work / preparation.settings(work)["model"]["weights"]
        module.load_state_dict(load_file(weights))
        return work, module.eval()

    return loaded


def tensors(preparation: ModuleType, work: Path, part: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """One part's data as the model takes them, and labels where there are any."""
    with np.load(work / f"{part}.npz") as stored:
        arrays = dict(stored)
    inputs = {name: torch.from_numpy(array) for name, array in preparation.model_inputs(work, arrays).items()}
    return inputs, torch.from_numpy(arrays["label"]) if "label" in arrays else None


@torch.no_grad()
def predictions(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Classes (n,), in batches of ten; of a dictionary, those of "digit"."""
    (values,) = inputs.values()
    outputs: list[Any] = [module(batch) for batch in values.split(10)]
    return torch.cat([(o["digit"] if isinstance(o, dict) else o).argmax(dim=1) for o in outputs])


def test_the_projects_are_those_that_prepare_writes(preparation: ModuleType) -> None:
    assert sorted(preparation.WRITERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_deploy_toml_has_only_known_keys(name: str) -> None:
    text = (HERE / "projects" / name / "deploy.toml").read_text(encoding="utf-8")
    tables = msgspec.convert(tomllib.loads(text), ProjectTables)
    assert tables.model.name == name
    assert tables.inputs


# torch's compiler, which scan and cond start in eager mode, reads .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ACCURACY_FLOORS)
def test_the_float_model_reaches_its_known_accuracy(
    preparation: ModuleType, load: Callable[[str], tuple[Path, nn.Module]], name: str
) -> None:
    work, module = load(name)
    inputs, labels = tensors(preparation, work, "evaluation")
    assert labels is not None
    assert (predictions(module, inputs) == labels).double().mean() >= ACCURACY_FLOORS[name]


def test_the_judged_speaker_is_in_no_other_part(real_project: Callable[[str], Path]) -> None:
    work = real_project("ds_cnn")
    sounds = {
        part: {sound.tobytes() for sound in np.load(work / f"{part}.npz")["sound"]}
        for part in ("train", "calibration", "evaluation")
    }
    assert len(sounds["evaluation"]) == 500
    assert not sounds["evaluation"] & (sounds["train"] | sounds["calibration"])


@pytest.mark.parametrize("name", ["resnet20", "cond", "lstm"])
def test_calibration_evaluation_and_training_data_are_disjoint(
    real_project: Callable[[str], Path], name: str
) -> None:
    work = real_project(name)
    parts = [np.load(work / f"{part}.npz")["image"] for part in ("calibration", "train")]
    calibration, train = ({picture.tobytes() for picture in part} for part in parts)
    assert len(calibration & train) <= 2  # the source holds a few pictures twice


def test_minilm_puts_a_sentence_nearest_to_its_own_beginning(
    preparation: ModuleType, load: Callable[[str], tuple[Path, nn.Module]]
) -> None:
    work, module = load("minilm")
    inputs, _ = tensors(preparation, work, "evaluation")
    ids, mask = (value[:32] for value in inputs.values())
    short = mask.clone()
    short[:, 24:] = 0
    with torch.no_grad():
        similarity = module(ids, mask) @ module(ids, short).T
    assert (similarity.argmax(dim=1) == torch.arange(32)).double().mean() >= 0.95


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_outputs_of_random_weights_move_with_the_inputs(
    load: Callable[[str], tuple[Path, nn.Module]], name: str
) -> None:
    _, module = load(name)
    with torch.no_grad():
        logits = module(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert logits.std(dim=0).mean() > 0.1 * logits.std()
