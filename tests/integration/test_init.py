"""What deploy init writes builds as it is, with and without data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
import torch
from torch import nn

def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
"""


def deploy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    skipped = shutil.ignore_patterns("build", "deploy.toml", "__pycache__")
    shutil.copytree(ROOT / "examples" / "digits", tmp_path / "digits", ignore=skipped)
    return tmp_path / "digits"


def test_the_digits_example_is_rebuilt_from_its_files_alone(digits: Path) -> None:
    done = deploy(digits, "init", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == "digits.safetensors"
    assert found["data"] == {
        "calibration": "calibration.npz",
        "evaluate": "evaluation.npz",
        "report": "report.npz",
        "recover": "train.npz",
    }
    built = deploy(digits, "build", "--target", "galaxy-s22", "--json", "--no-ladder", "--pattern", "none")
    assert built.returncode == 0, built.stderr
    manifest = json.loads(built.stdout)
    assert manifest["inputs"][0]["preprocess"] == {"scale": 0.0625}
    assert manifest["rungs"][0]["accuracy"]["value"] >= 0.97
    assert manifest["outputs"][0]["labels"]


def test_a_model_without_data_builds_and_says_that_its_accuracy_is_unmeasured(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(TINY)
    assert deploy(tmp_path, "init", "model.py:build", "-q").stdout == ""
    built = deploy(tmp_path, "build", "--target", "galaxy-s22", "--json")
    assert built.returncode == 0, built.stderr
    manifest = json.loads(built.stdout)
    assert manifest["inputs"][0]["shape"] == ["batch", 3, 8, 8]
    assert all(rung["accuracy"]["verdict"] == "unmeasured" for rung in manifest["rungs"])
    assert any("synthetic" in warning for warning in manifest["warnings"])
    assert not any(rung["name"].startswith("pruned") for rung in manifest["rungs"])


def test_a_second_init_leaves_the_file_and_exits_two(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(TINY)
    assert deploy(tmp_path, "init").returncode == 0
    before = (tmp_path / "deploy.toml").read_bytes()
    again = deploy(tmp_path, "init")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr
    assert (tmp_path / "deploy.toml").read_bytes() == before


def test_a_missing_model_exits_two_and_one_that_raises_four(tmp_path: Path) -> None:
    assert deploy(tmp_path, "init").returncode == 2
    assert deploy(tmp_path, "init", "absent.py").returncode == 2
    (tmp_path / "model.py").write_text("from torch import nn\ndef build() -> nn.Module:\n    raise OSError\n")
    done = deploy(tmp_path, "init")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
