"""Every stage of a build broken on purpose: each is caught, named, and leaves the last good build alone."""

import copy
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy.building import Build, BuildOptions, run_build
from deploy.cache import Cache
from deploy.planner import make_plan
from deploy.project import load
from exporters.executorch import ExecuTorchExporter, module_path
from exporters.remote import RemoteSession
from targets import catalog
from targets.errors import WrongOutputsError

TARGET = "galaxy-s22"

MODEL = """
import torch
from torch import nn


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        x = torch.relu(self.body(self.stem(image)))
        return self.head(x.mean(dim=(2, 3)))


def build():
    torch.manual_seed(0)
    net = TinyNet()
    nn.init.constant_(net.head.bias, 1.0)
    return net
"""

PROJECT = """
[model]
name = "tiny"
source = "model.py:build"

[inputs.image]
shape = [4, 2, 8, 8]
dtype = "float32"

[calibration]
source = "calibration.npz"
"""

WORKER = """#!{python}
import os, signal, sys, time
from multiprocessing.connection import Connection
from exporters import worker
{broken}
worker.serve(Connection(int(sys.argv[-1])))
"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A project whose last build was good, with the cache of that build but for the stages under test."""

    project: Path
    output: Path
    cache: Path

    def build(self, precision: str = "auto", *, output: Path | None = None) -> Build:
        """A build of the one rung in this precision, or of the whole ladder."""
        project = load(self.project).for_target(TARGET).override({"quantize": {"precision": precision}})
        plan = make_plan(project, catalog.find(TARGET))
        return run_build(plan, BuildOptions(output_dir=output or self.output))

    def forget(self, *stages: str) -> None:
        """Drops stages from the cache, so that they run again."""
        cache = Cache(self.cache)
        for folder, record in list(cache.entries()):
            if record.stage.split()[0] in stages:
                cache.remove(folder)

    def files(self) -> dict[str, bytes]:
        """The build folder's content."""
        return {
            str(f.relative_to(self.output)): f.read_bytes() for f in self.output.rglob("*") if f.is_file()
        }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("tiny")
    bench = Bench(project=work / "project", output=work / "out", cache=work / "cache")
    bench.project.mkdir()
    (bench.project / "model.py").write_text(MODEL)
    (bench.project / "deploy.toml").write_text(PROJECT)
    images = np.random.default_rng(0).normal(size=(32, 2, 8, 8)).astype(np.float32)
    np.savez(bench.project / "calibration.npz", image=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_DEPLOY_CACHE", str(bench.cache))
        assert all(rung.dropped is None for rung in bench.build().manifest.rungs)
    return bench


@pytest.fixture
def bench(good: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    own = Bench(project=good.project, output=tmp_path / "out", cache=tmp_path / "cache")
    shutil.copytree(good.cache, own.cache)
    shutil.copytree(good.output, own.output)
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(own.cache))
    return own


def _fails(bench: Bench, precision: str) -> str:
    """The message of a build that ends with exit 5 and changes nothing in the build folder."""
    before = bench.files()
    with pytest.raises(WrongOutputsError) as caught:
        bench.build(precision)
    assert caught.value.exit_code == 5
    assert bench.files() == before
    return caught.value.message


def _break_writing(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.export.ExportedProgram], None]
) -> None:
    """Spoils each program on its way into the lowering."""
    honest = ExecuTorchExporter.write

    def broken(self: ExecuTorchExporter, program: Any, precision: str, file: Path) -> Any:
        spoil(program)
        return honest(self, program, precision, file)

    monkeypatch.setattr(ExecuTorchExporter, "write", broken)


def _break_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, broken: str) -> None:
    """Puts a worker in place whose process does something else."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(python=sys.executable, broken=broken))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("exporters.isolated.environment.sys", SimpleNamespace(executable=str(script)))


def test_a_fold_that_changes_one_convolution_is_caught_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from exporters import capture

    honest = capture._fold_batch_norms_

    def broken(graph: torch.fx.GraphModule) -> None:
        honest(graph)
        graph.body.weight = nn.Parameter(graph.body.weight * 1.05)

    monkeypatch.setattr(capture, "_fold_batch_norms_", broken)
    bench.forget("export", "validate")
    message = _fails(bench, "float32")
    assert "the first stage to differ is fold" in message
    assert "first in body (aten.conv2d" in message
    with pytest.raises(WrongOutputsError):
        bench.build("float32", output=tmp_path / "fresh")
    assert not list((tmp_path / "fresh").rglob("*"))


def test_an_export_that_changes_a_constant_is_caught_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters import capture

    honest = capture._export

    def broken(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        program = honest(module, *arguments, **options)
        if not isinstance(module, torch.fx.GraphModule) and "body.bias" in program.state_dict:
            program.state_dict["body.bias"] = nn.Parameter(program.state_dict["body.bias"] + 0.1)
        return program

    monkeypatch.setattr(capture, "_export", broken)
    bench.forget("export", "validate")
    message = _fails(bench, "float32")
    assert "the first stage to differ is export" in message
    assert "first in body" in message


def test_a_lowering_that_flips_a_sign_is_caught_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(program: torch.export.ExportedProgram) -> None:
        name = next(name for name in program.state_dict if name.endswith("body.weight"))
        program.state_dict[name] = nn.Parameter(-program.state_dict[name])

    _break_writing(monkeypatch, spoil)
    bench.forget("export", "validate")
    message = _fails(bench, "float32")
    assert "the first stage to differ is lower" in message
    assert "first in body (aten.conv2d" in message


def test_a_program_that_answers_nan_is_caught_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(program: torch.export.ExportedProgram) -> None:
        name = next(name for name in program.state_dict if name.endswith("head.bias"))
        program.state_dict[name] = nn.Parameter(torch.full_like(program.state_dict[name], torch.nan))

    _break_writing(monkeypatch, spoil)
    bench.forget("export", "validate")
    message = _fails(bench, "float32")
    assert "lower (NaN or infinite outputs" in message
    assert "first in head (aten.linear" in message


def test_weights_damaged_in_the_file_are_told_from_a_wrong_lowering(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ExecuTorchExporter.export

    def broken(self: ExecuTorchExporter, captured: Any, *, file: Path, **options: Any) -> Any:
        artifact = honest(self, captured, file=file, **options)
        weights = captured.graph.body.weight.detach().numpy()
        row = np.ascontiguousarray(weights.transpose(0, 2, 3, 1))[0].tobytes()[:64]
        data = file.read_bytes()
        assert row in data
        file.write_bytes(data.replace(row, np.full(16, 0.5, np.float32).tobytes()))
        return artifact

    monkeypatch.setattr(ExecuTorchExporter, "export", broken)
    bench.forget("export", "validate")
    message = _fails(bench, "float32")
    assert "the first stage to differ is lower" in message
    assert "the file itself is damaged" in message


def test_a_runtime_fed_with_channels_last_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _break_worker(
        monkeypatch,
        tmp_path,
        "import torch\n"
        "from exporters.executorch import ExecuTorchSession as Session\n"
        "honest = Session._tensor\n"
        "Session._tensor = lambda *a: honest(*a).contiguous(memory_format=torch.channels_last)\n",
    )
    bench.forget("validate")
    message = _fails(bench, "float32")
    assert "the first stage to differ is lower" in message
    assert "first in stem.0" in message


def test_a_runtime_that_crashes_ends_the_build_and_names_the_signal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = "worker.Worker.run = lambda self, inputs: os.kill(os.getpid(), signal.SIGSEGV)"
    _break_worker(monkeypatch, tmp_path, crash)
    bench.forget("validate")
    assert "SIGSEGV in run" in _fails(bench, "float32")


def test_a_runtime_that_hangs_ends_the_build_after_its_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hang = "worker.Worker.open = lambda *a: None\nworker.Worker.run = lambda *a: time.sleep(600)"
    _break_worker(monkeypatch, tmp_path, hang)
    monkeypatch.setitem(RemoteSession.__init__.__kwdefaults__, "timeout_s", 3.0)
    bench.forget("validate")
    assert "no answer to run in 3 s" in _fails(bench, "float32")


def test_a_lossy_rung_whose_runtime_crashes_is_the_one_that_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = "worker.Worker.run = lambda self, inputs: os.kill(os.getpid(), signal.SIGSEGV)"
    _break_worker(monkeypatch, tmp_path, crash)
    bench.forget("validate")
    message = _fails(bench, "int8")
    assert "no rung may ship" in message
    assert "dense-int8" in message
    assert "SIGSEGV" in message


def test_a_file_that_the_runtime_refuses_to_load_is_a_wrong_output(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ExecuTorchExporter.write

    def broken(self: ExecuTorchExporter, program: Any, precision: str, file: Path) -> Any:
        delegated = honest(self, program, precision, file)
        file.write_bytes(file.read_bytes()[:200])
        return delegated

    monkeypatch.setattr(ExecuTorchExporter, "write", broken)
    bench.forget("export", "validate")
    message = _fails(bench, "int8")
    assert "dense-int8" in message
    assert "loads" in message


def test_a_constant_int8_program_is_dropped_although_its_snr_would_pass(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's outputs lie near 1 and vary little: the constant 1 is within 15 dB of them."""

    def spoil(program: torch.export.ExportedProgram) -> None:
        name = next(n for n, v in program.state_dict.items() if v.dtype == torch.int8 and v.shape == (4, 8))
        program.state_dict[name] = torch.zeros_like(program.state_dict[name])

    _break_writing(monkeypatch, spoil)
    bench.forget("export", "validate")
    message = _fails(bench, "int8")
    assert "outputs do not move with the inputs" in message
    assert "the first stage to differ is lower" in message
    assert "first in head" in message


def test_a_quantizer_with_a_wrong_scale_costs_its_rung_and_not_the_build(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ExecuTorchExporter.quantized

    def broken(self: ExecuTorchExporter, captured: Any, graph: Any, precision: str, **options: Any) -> Any:
        made = honest(self, captured, graph, precision, **options)
        if precision == "int8":
            _multiply_weight_scale_(made, "head", 30.0)
        return made

    monkeypatch.setattr(ExecuTorchExporter, "quantized", broken)
    bench.forget("export", "validate")
    build = bench.build()
    wrong = next(rung for rung in build.manifest.rungs if rung.name == "dense-int8")
    assert build.manifest.shipped_rung != "dense-int8"
    assert wrong.dropped is not None
    assert "the first stage to differ is quantize" in wrong.dropped
    assert "first in head (aten.linear" in wrong.dropped


def _multiply_weight_scale_(graph: torch.fx.GraphModule, path: str, factor: float) -> None:
    """Changes the scale of one layer's weights, where they are quantized."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and module_path(node) == path:
            weight = node.args[1]
            if "dequantize_per_channel" in str(weight.target):
                scale = weight.args[1].target
                setattr(graph, scale, copy.deepcopy(getattr(graph, scale)) * factor)
