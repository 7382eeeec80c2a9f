"""examples/digits is what it says: real data in disjoint parts, weights that its own script trains."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
PARTS = ("train", "calibration", "evaluation", "report")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The example's modules under private names; train.py imports its sibling `model`."""
    loaded = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("model", "train", "prepare_data"):
            spec = importlib.util.spec_from_file_location(f"digits_{name}", FOLDER / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            loaded[name] = module
    return loaded


def arrays(part: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{part}.npz") as data:
        return dict(data)


def test_the_four_parts_are_disjoint_and_cover_all_digits() -> None:
    from sklearn.datasets import load_digits

    pictures = [picture.tobytes() for part in PARTS for picture in arrays(part)["image"]]
    wanted = load_digits().data.astype(np.uint8)
    assert sorted(pictures) == sorted(picture.tobytes() for picture in wanted)


def test_the_script_reproduces_the_committed_data(scripts: dict[str, ModuleType]) -> None:
    for part, made in scripts["prepare_data"].parts().items():
        for name, array in arrays(part).items():
            np.testing.assert_array_equal(array, made[name])


def test_the_committed_weights_are_small_and_good(scripts: dict[str, ModuleType]) -> None:
    assert (FOLDER / "digits.safetensors").stat().st_size < 500_000
    model = scripts["model"].build()
    model.load_state_dict(load_file(FOLDER / "digits.safetensors"))
    assert scripts["train"].accuracy(model.eval()) >= 0.98


def test_training_reproduces_the_accuracy(scripts: dict[str, ModuleType]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = scripts["train"].train()
    finally:
        torch.set_num_threads(threads)
    committed = scripts["model"].build()
    committed.load_state_dict(load_file(FOLDER / "digits.safetensors"))
    reached, wanted = (scripts["train"].accuracy(model.eval()) for model in (trained, committed))
    assert abs(reached - wanted) <= 0.012
