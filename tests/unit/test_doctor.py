"""What `deploy doctor` finds, and how it says so."""

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from packaging.specifiers import SpecifierSet

from deploy import diagnosis, extras
from deploy.cli.main import run
from deploy.diagnosis import SEVERITIES, Diagnosis, Finding, diagnose
from deploy.extras import Requirement
from exporters.base import EXPORTERS, Form

AT_HOME = [name for name, entry in EXPORTERS.items() if not entry.isolated]
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
VERSIONS = (
    "1.4", "1.4.0", "1.4.1", "1.4.1+cpu", "1.4.1rc1", "1.4.1.post1", "1.5", "1.5.0.dev20251101", "1.5a1",
    "1.10", "2.13.0", "2.13.0+cu130", "2.13.1", "0.9",
)  # fmt: skip
SPECIFIERS = (
    "==1.4.1", "!=1.4.1", ">=1.4.1", "<=1.4.1", "<1.5", ">1.4", ">=1.4.1,<1.5", "==2.13.0", "<2,>=1.4",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions laid over those installed; None takes a package away."""
    laid_over: dict[str, str | None] = {}

    def version(package: str) -> str | None:
        if package in laid_over:
            return laid_over[package]
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    monkeypatch.setattr(diagnosis, "version", version)
    return laid_over


def named(found: Diagnosis, area: str, name: str) -> Finding:
    return next(finding for finding in found.findings if (finding.area, finding.name) == (area, name))


@pytest.mark.parametrize("specifier", SPECIFIERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_versions_compare_as_packaging_compares_them(version: str, specifier: str) -> None:
    assert extras.fits(version, specifier) == SpecifierSet(specifier).contains(version, prereleases=True)


def test_every_bound_of_pyproject_can_be_compared() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = list(itertools.chain(project["dependencies"], *project["optional-dependencies"].values()))
    parsed = [extras.parse(line) for line in lines]
    assert {"torch", "executorch", "click"} <= {requirement.name for requirement in parsed}
    assert all(extras.fits("0", r.specifier) in (True, False) for r in parsed)
    extras.fits("3.11.7", project["requires-python"])


def test_a_line_of_metadata_gives_name_bounds_and_extra() -> None:
    line = 'executorch[all] (<1.5,>=1.4.1) ; extra == "executorch"'
    assert extras.parse(line) == Requirement(name="executorch", specifier=">=1.4.1,<1.5", extra="executorch")


def test_what_developers_need_is_not_asked_of_users() -> None:
    names = {requirement.name for requirement in extras.requirements()}
    assert "torch" in names
    assert not {"pytest", "mypy", extras.DISTRIBUTION} & names


def test_a_complete_installation_is_usable() -> None:
    found = diagnose()
    assert found.usable == AT_HOME
    assert found.exit_code == 0
    assert named(found, "packages", "torch").severity == "ok"


def test_findings_come_worst_first_and_every_bad_one_has_a_fix(
    versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions |= {"torch": "2.12.0", "transformers": None}
    monkeypatch.setenv("QNN_SDK_ROOT", "/no/such/sdk")
    found = diagnose()
    order = [SEVERITIES.index(finding.severity) for finding in found.findings]
    assert order == sorted(order)
    assert {"broken", "warning", "optional", "ok"} == {finding.severity for finding in found.findings}
    assert all(f.fix for f in found.findings if f.severity in ("broken", "warning"))


def test_a_version_that_was_not_tried_makes_the_exporter_unusable(versions: dict[str, str | None]) -> None:
    versions["torch"] = "2.12.0+cpu"
    found = diagnose()
    assert found.exit_code == 3
    assert found.usable == []
    assert named(found, "packages", "torch").fix == "pip install 'torch==2.13.0'"
    assert "torch 2.12.0+cpu instead of ==2.13.0" in named(found, "runtimes", "executorch").found


def test_without_its_packages_no_exporter_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    found = diagnose()
    assert found.exit_code == 3
    runtime = named(found, "runtimes", "executorch")
    assert runtime.severity == "broken"
    assert runtime.fix == "pip install 'edge-deploy[executorch]'"


def test_an_exporter_that_lacks_something_is_optional_beside_one_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = type(EXPORTERS["executorch"])(
        attribute="none:None", accepts=Form.GRAPH, extra="other", packages=("no_such_thing",), runs_on=()
    )
    monkeypatch.setitem(EXPORTERS, "other", other)
    found = diagnose()
    assert found.exit_code == 0
    assert named(found, "runtimes", "other").severity == "optional"


def test_an_extra_that_builds_do_not_need_is_optional(versions: dict[str, str | None]) -> None:
    versions["transformers"] = None
    found = diagnose()
    lacking = named(found, "packages", "transformers")
    assert (lacking.severity, lacking.fix) == ("optional", "pip install 'edge-deploy[transformers]'")
    assert found.exit_code == 0


def test_a_cache_that_cannot_be_written_stops_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "file" / "cache"))
    found = diagnose()
    assert named(found, "cache", "folder").severity == "broken"
    assert found.exit_code == 3


def test_looking_at_the_cache_does_not_make_it(tmp_path: Path) -> None:
    diagnose()
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_the_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(bytes(3_000_000))
    assert named(diagnose(), "cache", "folder").found.endswith("cache, 3 MB")


def test_little_room_on_the_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda place: usage(10**10, 10**10 - 10**8, 10**8))
    disk = named(diagnose(), "cache", "disk")
    assert (disk.severity, disk.found) == ("warning", "0.1 GB free")


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = diagnosis.usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    threads = named(diagnose(), "threads", "cores")
    assert (threads.severity, threads.fix) == ("warning", f"export OMP_NUM_THREADS={cores}")


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1), ("max 100000\n", 8), ("", 8)])
def test_a_quota_of_the_container_counts(
    text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(diagnosis, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert diagnosis.usable_cores() == cores


def test_another_python_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.platform, "python_version", lambda: "3.12.1")
    python = named(diagnose(), "environment", "python")
    assert python.severity == "broken"
    assert "3.11" in str(python.fix)


def test_an_untried_host_is_a_warning_and_builds_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.platform, "system", lambda: "Darwin")
    found = diagnose()
    assert named(found, "environment", "host").severity == "warning"
    assert found.exit_code == 0


def test_a_system_without_file_locks_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis.find_spec
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None if name == "fcntl" else real(name))
    found = diagnose()
    assert named(found, "environment", "host").severity == "broken"
    assert found.exit_code == 3


def test_telemetry_that_is_switched_off_is_said_to_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    for name in diagnosis.TELEMETRY["huggingface_hub"][0]:
        monkeypatch.delenv(name, raising=False)
    on = named(diagnose(), "privacy", "huggingface_hub")
    assert (on.severity, on.fix) == ("optional", "export HF_HUB_DISABLE_TELEMETRY=1")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert named(diagnose(), "privacy", "huggingface_hub").found == "off by DO_NOT_TRACK"


def test_a_library_that_cannot_be_loaded_is_found_by_a_deep_look(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy import trial

    def fails(runtime: str) -> None:
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.setattr(trial, "try_exporter", fails)
    found = diagnose(deep=True)
    assert found.exit_code == 3
    assert "libsomething" in named(found, "runtimes", "executorch").found


def test_outputs_that_differ_are_found_by_a_deep_look(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from deploy import trial

    monkeypatch.setattr(trial, "_lower_and_run", lambda *_: np.ones((1, 4), np.float32))
    found = diagnose(deep=True)
    assert found.exit_code == 3
    assert "answered wrongly" in named(found, "runtimes", "executorch").found


def test_a_deep_look_lowers_and_runs_a_model() -> None:
    """In a process of its own: importing ExecuTorch warns, and warnings are errors here."""
    words = [sys.executable, "-m", "deploy.cli.main", "doctor", "--deep", "--json"]
    ended = subprocess.run(words, capture_output=True, check=False, text=True)
    assert ended.returncode == 0, ended.stderr
    found = msgspec.json.decode(ended.stdout, type=Diagnosis)
    assert found.usable == AT_HOME
    assert "a two-layer model was lowered and ran" in named(found, "runtimes", "executorch").found


def test_json_holds_the_findings_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["usable"] == AT_HOME
    assert {"area", "name", "severity", "found", "expected", "fix"} == set(printed["findings"][0])


def test_the_table_ends_with_the_verdict(
    versions: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Builds can use {', '.join(AT_HOME)}."
    versions["torch"] = None
    assert run(["doctor"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("broken")
    assert lines[-1] == f"No build can work here yet: {', '.join(EXPORTERS)}."


def test_doctor_does_not_load_torch() -> None:
    code = (
        "import sys; from deploy.cli.main import run; run(['doctor', '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
