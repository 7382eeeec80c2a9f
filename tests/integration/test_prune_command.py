"""`deploy prune`: a training checkpoint of the digits comes back smaller, and its training goes on."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.cli.main import run
from deploy.pruning.delta import load_pruned
from deploy.pruning.folder import load_folder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits"
EPOCHS = 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

# Importing any of these fails: the folder must load where the tool was never installed.
ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        absent = ("deploy", "targets", "calibration", "exporters", "torch_pruning", "msgspec", "click")
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.path[:0] = sys.argv[1:3]
import torch
from load import load
from model import build

torch.manual_seed(7)
module = load(build).eval()
torch.save(module(torch.load(sys.argv[3])), sys.argv[4])
"""


def imported(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, as a user has it."""
    folder = tmp_path_factory.mktemp("some where") / "digits"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def build(digits: Path) -> Callable[[], nn.Module]:
    factory: Callable[[], nn.Module] = imported(digits / "model.py", "digits_model").build
    return factory


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    """The training part, as train.py reads it."""
    import numpy as np

    with np.load(EXAMPLE / "train.npz") as arrays:
        return torch.from_numpy(arrays["image"]).float() * 0.0625, torch.from_numpy(arrays["label"])


def train(module: nn.Module, optimizer: Any, samples: tuple[Tensor, Tensor], seed: int) -> list[float]:
    """One epoch; the losses of its steps."""
    images, labels = samples
    module.train()
    losses = []
    for batch in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(64):
        loss = functional.cross_entropy(module(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def loss_of(module: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    """The loss over all samples in training mode, as training sees it; the module stays as it is."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loss = functional.cross_entropy(module.train()(samples[0]), samples[1]).item()
    module.load_state_dict(state)
    return loss


@pytest.fixture(scope="module", params=sorted(OPTIMIZERS))
def trained(
    request: pytest.FixtureRequest,
    digits: Path,
    build: Callable[[], nn.Module],
    samples: tuple[Tensor, Tensor],
) -> tuple[str, Path, Path]:
    """An optimizer's name, the checkpoint in the middle of training, and what became of it."""
    name = request.param
    torch.manual_seed(0)
    module = build()
    optimizer = OPTIMIZERS[name](module.parameters())
    for epoch in range(EPOCHS):
        train(module, optimizer, samples, epoch)
    file = digits / f"{name} épochs.pt"
    torch.save(
        {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": 4 * EPOCHS,
            "note": "mid-training",
        },
        file,
    )
    out = digits / "out" / name
    assert run(["prune", str(file), "-o", str(out), "--sparsity", "0.4", "-q"]) == 0
    return name, file, out


def kept_by_hand(dense: Mapping[str, Tensor], smaller: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Rows and columns of each parameter that stay, read from the batch-norms' values and the model."""

    def survivors(norm: str) -> list[int]:
        values = dense[f"{norm}.running_var"].tolist()
        assert len(set(values)) == len(values)
        return [values.index(value) for value in smaller[f"{norm}.running_var"].tolist()]

    stem, first, wide, second = map(survivors, ("stem.1", "block1.expand.1", "widen.1", "block2.expand.1"))
    layers = {
        "stem": (stem, [0]), "block1.expand": (first, stem), "block1.depthwise": (first, [0]),
        "block1.project": (stem, first), "widen": (wide, stem), "block2.expand": (second, wide),
        "block2.depthwise": (second, [0]), "block2.project": (wide, second),
    }  # fmt: skip
    kept: dict[str, tuple[Any, Any]] = {}
    for layer, (rows, columns) in layers.items():
        kept[f"{layer}.0.weight"] = (rows, columns)
        kept |= dict.fromkeys((f"{layer}.1.weight", f"{layer}.1.bias"), (rows, None))
    ten = list(range(10))
    return kept | {"classifier.weight": (ten, wide), "classifier.bias": (ten, None)}


def cut(tensor: Tensor, rows: list[int], columns: list[int] | None) -> Tensor:
    return tensor[rows] if columns is None else tensor[rows][:, columns]


def test_weights_and_moments_are_those_of_the_surviving_channels(
    trained: tuple[str, Path, Path], build: Callable[[], nn.Module]
) -> None:
    name, file, out = trained
    dense = torch.load(file, weights_only=True)
    smaller = torch.load(out / "checkpoint.pt", weights_only=True)
    kept = kept_by_hand(dense["model"], smaller["model"])
    names = [parameter for parameter, _ in build().named_parameters()]
    assert set(names) == set(kept)
    for number, parameter in enumerate(names):
        assert torch.equal(smaller["model"][parameter], cut(dense["model"][parameter], *kept[parameter]))
        for moment in MOMENTS[name]:
            old, new = (each["optimizer"]["state"][number][moment] for each in (dense, smaller))
            assert torch.equal(new, cut(old, *kept[parameter]))
    assert (smaller["step"], smaller["note"]) == (dense["step"], dense["note"])
    assert smaller["optimizer"]["param_groups"] == dense["optimizer"]["param_groups"]


def test_training_goes_on_without_a_jump_beyond_what_pruning_cost(
    trained: tuple[str, Path, Path], build: Callable[[], nn.Module], samples: tuple[Tensor, Tensor]
) -> None:
    name, _, out = trained
    pruned = load_pruned(build, out / "model.safetensors")
    before = loss_of(pruned, samples)
    module = imported(out / "load.py", "pruned_loader").load(build)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    module.load_state_dict(checkpoint["model"])
    optimizer = OPTIMIZERS[name](module.parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert loss_of(module, samples) == before
    order = torch.randperm(len(samples[1]), generator=torch.Generator().manual_seed(EPOCHS))
    losses = []
    for start in range(0, 640, 64):
        batch = order[start : start + 64]
        expected = loss_of(module, (samples[0][batch], samples[1][batch]))
        assert train(module, optimizer, (samples[0][batch], samples[1][batch]), 0) == [
            pytest.approx(expected, rel=1e-4)
        ]
        losses.append(loss_of(module, samples))
    assert max(losses) < before
    assert losses[-1] < before / 2


def test_the_folder_loads_bit_for_bit_where_the_tool_is_absent(
    trained: tuple[str, Path, Path], digits: Path, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    _, _, out = trained
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.save(images, tmp_path / "in.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(out), str(digits), "in.pt", "out.pt"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = load_folder(build, out).eval()(images)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert expected.std(dim=0).min() > 0


def test_the_record_says_what_was_asked_achieved_and_done_to_what(
    trained: tuple[str, Path, Path], build: Callable[[], nn.Module]
) -> None:
    import hashlib

    _, file, out = trained
    record = json.loads((out / "pruning.json").read_text())
    assert record["schema_version"] == "1.0"
    assert record["asked"] == 0.4
    assert abs(record["achieved"] - 0.4) <= 0.02
    assert record["achieved"] == pytest.approx(
        1 - record["after"]["macs"] / record["before"]["macs"], abs=1e-4
    )
    pruned = load_pruned(build, out / "model.safetensors")
    assert record["after"]["parameters"] == sum(each.numel() for each in pruned.parameters())
    widths = {each["layer"]: each["after"] for each in record["layers"]}
    weights = {path: part.weight for path, part in pruned.named_modules() if path in widths}
    assert widths == {path: weight.shape[0] for path, weight in weights.items()}
    assert {each["layer"] for each in record["spared"]} == {"stem.0", "classifier", "block1.project.0"}
    assert record["origin"]["checkpoint_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["origin"]["factory"] == "model.py:build"
    assert {each["path"]: each["sha256"] for each in record["files"]} == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "checkpoint.pt", "load.py")
    }


def test_the_targets_preferred_runtime_gives_the_multiple(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(digits / "digits.safetensors"), "-o", str(digits / "dry")]
    assert run([*words, "--target", "galaxy-s22", "--json", "--dry-run"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["origin"]["target"] == "galaxy-s22"
    assert record["channel_multiple"] > 1
    narrowed = [each["after"] for each in record["layers"] if each["after"] < each["before"]]
    assert narrowed
    assert all(width % record["channel_multiple"] == 0 for width in narrowed)
    assert record["files"] == []
    assert not (digits / "dry").exists()


def test_the_summary_shows_costs_widths_what_was_spared_and_the_next_step(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ünïcode and spaces"
    words = ["--criterion", "taylor", "--of", "parameters", "--exclude", "block1.*"]
    assert run(["prune", str(digits / "digits.safetensors"), "-o", str(out), *words]) == 0
    shown = capsys.readouterr().out
    for part in ("40.0% of parameters asked", "MACs", "widen.0", "spared", "load.load(build)", str(out)):
        assert part in shown
    assert sorted(path.name for path in out.iterdir()) == ["load.py", "model.safetensors", "pruning.json"]
    record = json.loads((out / "pruning.json").read_text())
    assert (record["criterion"], record["exclude"]) == ("taylor", ["block1.*"])
    assert all(each["before"] == each["after"] for each in record["layers"] if "block1" in each["layer"])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
