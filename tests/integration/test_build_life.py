"""A build's life: cached, resumed after kill -9, locked, beside another build, and what its flags demand."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy.cli.main import run

Captured = pytest.CaptureFixture[str]

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.third, self.head = nn.Conv2d(32, 16, 3), nn.Linear(16, 4)

    def forward(self, image):
        x = self.third(self.second(self.first(image).relu()).relu()).relu()
        return self.head(x.mean((2, 3))) * 20

def build():
    return Net()
"""
CONFIG = """
[model]
name = "net"
source = "model.py:build"
[inputs.image]
shape = ["batch", 1, 8, 8]
dynamic.batch = { min = 1, max = 4 }
[outputs.logits]
[calibration]
source = "data.npz"
[evaluate]
source = "data.npz"
max_drop = 0.5
[prune]
sparsity = 0.4
"""
FAST = ("--precision", "float32", "--no-ladder", "--pattern", "none")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project whose labels are its own float answers, and a cache that all tests here share."""
    import torch

    folder = tmp_path_factory.mktemp("net")
    (folder / "model.py").write_text(MODEL)
    (folder / "deploy.toml").write_text(CONFIG)
    namespace: dict = {}
    exec(MODEL, namespace)
    images = np.random.default_rng(0).standard_normal((96, 1, 8, 8)).astype("float32")
    with torch.no_grad():
        labels = namespace["build"]().eval()(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(folder / "data.npz", image=images, label=labels)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "net"
    shutil.copytree(template, copy)
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    return copy


def build(project: Path, *flags: str) -> int:
    return run(
        ["build", "-c", str(project), "--target", "galaxy-s22", "-o", str(project / "out"), "-q", *flags]
    )


def folder(project: Path) -> Path:
    return project / "out" / "net" / "galaxy-s22"


def manifest(project: Path) -> dict:
    data: dict = json.loads((folder(project) / "manifest.json").read_text())
    return data


def report(project: Path) -> dict:
    data: dict = json.loads((folder(project) / "report.json").read_text())
    return data


def program(project: Path) -> str:
    return next(file["sha256"] for file in manifest(project)["files"] if file["role"] == "program")


def test_a_second_build_runs_nothing_again_and_loads_no_torch(project: Path) -> None:
    assert build(project, *FAST) == 0
    arguments = ["build", "-c", str(project), "--target", "galaxy-s22", "-o", str(project / "out"), *FAST]
    code = (
        f"import sys\nfrom deploy.cli.main import run\ncode = run({arguments!r})\n"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(stage["cached"] for stage in report(project)["stages"])


def test_explain_cache_names_what_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(project, *FAST) == 0
    text = (project / "model.py").read_text()
    (project / "model.py").write_text(text.replace("* 20", "* 21"))
    flags = [flag for flag in FAST if flag != "-q"]
    command = ["build", "-c", str(project), "--target", "galaxy-s22", "-o", str(project / "out")]
    assert run([*command, "--explain-cache", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    explained = next(line for line in lines if line.startswith("export dense-float:"))
    assert "ran" in explained
    assert "changed: module" in explained


def test_no_cache_runs_every_stage_again_to_the_same_bytes(project: Path) -> None:
    assert build(project, *FAST) == 0
    before = program(project)
    assert build(project, *FAST, "--no-cache") == 0
    assert not any(stage["cached"] for stage in report(project)["stages"])
    assert program(project) == before


def test_locked_rebuilds_the_build_although_deploy_toml_changed(project: Path) -> None:
    assert build(project, *FAST) == 0
    before = program(project)
    changed = (project / "deploy.toml").read_text().replace("max_drop = 0.5", "max_drop = 0.1")
    (project / "deploy.toml").write_text(changed)
    assert build(project, "--locked") == 0
    assert program(project) == before
    lock = (folder(project) / "deploy.lock.toml").read_text()
    assert "max_drop = 0.5" in lock
    assert "float32" in lock


def test_locked_refuses_other_versions_with_the_line_that_installs_them(
    project: Path, capsys: Captured
) -> None:
    assert build(project, *FAST) == 0
    lock = folder(project) / "deploy.lock.toml"
    lock.write_text(lock.read_text().replace('torch = "2', 'torch = "1'))
    assert build(project, "--locked") == 3
    assert "pip install" in capsys.readouterr().err


def start(project: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploy.cli.main", "build", "-c", str(project), "--target", "galaxy-s22"]
    return subprocess.Popen(
        [*command, "-o", str(project / "out"), "-q", *FAST],
        stderr=stderr,
        start_new_session=True,
    )


def test_a_killed_build_leaves_the_good_one_whole_and_resumes_to_the_same_bytes(project: Path) -> None:
    assert build(project, *FAST) == 0
    good = {path.name: path.read_bytes() for path in folder(project).iterdir() if path.is_file()}
    cache = Path(os.environ["EDGE_DEPLOY_CACHE"])
    for seconds in (1.0, 3.0, 5.0):
        shutil.rmtree(cache, ignore_errors=True)
        process = start(project)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = {path.name: path.read_bytes() for path in folder(project).iterdir() if path.is_file()}
        assert left == good
    assert build(project, *FAST) == 0
    assert hashlib.sha256(good[next(n for n in good if n.endswith(".pte"))]).hexdigest() == program(project)
    assert not list((project / "out").rglob("*.new*"))
    assert not list((cache / "tmp").iterdir())


def test_two_builds_of_one_project_at_once_both_end_well(project: Path) -> None:
    processes = [start(project, subprocess.PIPE), start(project, subprocess.PIPE)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    content = manifest(project)
    for file in content["files"]:
        assert hashlib.sha256((folder(project) / file["path"]).read_bytes()).hexdigest() == file["sha256"]


@pytest.fixture(scope="module")
def ladder(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole ladder of the small project, kept; a size budget that nothing meets."""
    copy = tmp_path_factory.mktemp("ladder") / "net"
    shutil.copytree(template, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_DEPLOY_CACHE", str(copy / "cache"))
        assert build(copy, "--keep-rungs") == 0
        yield copy  # type: ignore[misc]


def test_keep_rungs_writes_the_losing_artifacts_too(ladder: Path) -> None:
    kept = {path.name.rsplit("-", 1)[0] for path in (folder(ladder) / "rungs").iterdir()}
    assert kept == {rung["name"] for rung in manifest(ladder)["rungs"]}


def test_objective_size_ships_the_smallest_rung(ladder: Path) -> None:
    assert build(ladder, "--objective", "size") == 0
    sizes = {rung["name"]: rung["size_bytes"] for rung in manifest(ladder)["rungs"] if not rung["dropped"]}
    assert sizes[manifest(ladder)["shipped_rung"]] == min(sizes.values())


def test_a_missed_size_budget_marks_the_build_and_exits_6(
    ladder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ladder / "deploy.toml"
    plain = config.read_text()
    config.write_text(plain + "[budget]\nsize_mb = 0.0001\n")
    try:
        assert build(ladder) == 6
    finally:
        config.write_text(plain)
    assert "size_mb is missed" in capsys.readouterr().err
    line = next(line for line in manifest(ladder)["budget"] if line["name"] == "size_mb")
    assert line["verdict"] == "missed"
    assert line["value"] > 0.0001


def test_require_measured_exits_6_for_a_phone(ladder: Path) -> None:
    assert build(ladder, "--require-measured") == 6
    assert manifest(ladder)["shipped_rung"]


def test_require_delegated_drops_rungs_with_operators_outside(
    ladder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder(ladder) / "manifest.json").read_bytes()
    left = [rung["delegation"]["left"] for rung in json.loads(before)["rungs"]]
    code = build(ladder, "--require-delegated")
    if all(left):
        assert code == 5
        assert "--require-delegated" in capsys.readouterr().err
        assert (folder(ladder) / "manifest.json").read_bytes() == before
    else:
        dropped = [rung for rung in manifest(ladder)["rungs"] if rung["delegation"]["left"]]
        assert code == 0
        assert all("--require-delegated" in rung["dropped"] for rung in dropped)


@pytest.mark.parametrize("precision", ["float16", "int8-dynamic"])
def test_other_precisions_agree_with_the_module(ladder: Path, precision: str) -> None:
    assert build(ladder, "--precision", precision, "--no-ladder", "--pattern", "none") == 0
    (rung,) = manifest(ladder)["rungs"]
    assert rung["name"] == f"dense-{precision}"
    assert rung["parity"]["snr_db"] >= {"float16": 45, "int8-dynamic": 15}[precision]


def test_a_host_build_is_chosen_by_the_device_itself(ladder: Path) -> None:
    flags = ["-o", str(ladder / "host"), "-q", "--no-ladder", "--precision", "float32", "--pattern", "none"]
    assert run(["build", "-c", str(ladder), "--target", "host", *flags]) == 0
    content = json.loads((ladder / "host" / "net" / "host" / "manifest.json").read_text())
    assert content["chosen_by"] == "device"
    assert content["fallback"] is None


@pytest.mark.parametrize("target", ["h200", "ethos-u85", "web", "coral-edge-tpu"])
def test_a_target_without_an_exporter_plans_but_its_build_exits_3_and_names_what_is_missing(
    project: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "-c", str(project), "--target", target]) == 0
    assert run(["build", "-c", str(project), "--target", target, "-o", str(project / "out")]) == 3
    assert "no exporter for" in capsys.readouterr().err
    assert not (project / "out").exists()
