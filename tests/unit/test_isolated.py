"""Environments of their own: made whole or not at all, and told where they cannot be."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporters.isolated import environment
from exporters.isolated.environment import ENVIRONMENTS, Isolated, command, prepare
from targets.errors import MissingRequirementError


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Isolated:
    """An environment that needs nothing from an index, in a cache of its own."""
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path))
    made = replace(ENVIRONMENTS["deepsparse"], name="empty", requirements=(), system=os.uname().sysname)
    made = replace(made, machine=os.uname().machine)
    monkeypatch.setitem(ENVIRONMENTS, "empty", made)
    return made


def test_every_requirement_is_pinned_by_its_hash() -> None:
    for isolated in ENVIRONMENTS.values():
        assert all("==" in line and "--hash=sha256:" in line for line in isolated.requirements)


def test_an_environment_is_made_once_and_runs_our_modules(empty: Isolated) -> None:
    told: list[str] = []
    assert prepare("empty", told.append) == prepare("empty", told.append) == empty.python
    assert told == ["making an environment for empty"]
    done = subprocess.run(
        command("empty", "exporters.base"), capture_output=True, text=True, check=False, cwd=empty.folder
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_packages_that_cannot_be_had_are_told_and_leave_nothing(
    empty: Isolated, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = replace(empty, requirements=(f"no-such-package-here==1.0 --hash=sha256:{'0' * 64}",))
    monkeypatch.setitem(ENVIRONMENTS, "empty", lacking)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(MissingRequirementError, match="no-such-package-here") as caught:
        prepare("empty")
    assert "package index" in caught.value.message
    assert list((lacking.folder.parent).iterdir()) == []


def test_a_file_with_another_hash_is_not_installed(empty: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ENVIRONMENTS["deepsparse"].requirements[1].partition("sha256:")[0] + f"sha256:{'0' * 64}"
    monkeypatch.setitem(ENVIRONMENTS, "empty", replace(empty, requirements=(listed,)))
    with pytest.raises(MissingRequirementError):
        prepare("empty")


def test_another_machine_is_told(empty: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENTS, "empty", replace(empty, machine="riscv64"))
    with pytest.raises(MissingRequirementError, match="riscv64"):
        prepare("empty")


def test_where_uv_fails_pip_does_it(empty: Isolated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "uv"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
    assert prepare("empty").exists()


def test_a_runtime_of_this_environment_starts_with_this_python() -> None:
    assert command("onnxruntime", "exporters.worker") == [sys.executable, "-P", "-m", "exporters.worker"]


def test_of_two_that_are_made_at_once_one_stays(empty: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    install = environment._install

    def slowly(name: str, made: Path, listed: Path) -> None:
        install(name, made, listed)
        if not empty.folder.exists():
            monkeypatch.setattr(environment, "_install", install)
            prepare("empty")  # the other one is quicker

    monkeypatch.setattr(environment, "_install", slowly)
    assert prepare("empty").exists()
    assert [each.name for each in empty.folder.parent.iterdir()] == [empty.folder.name]


def test_nothing_is_installed_by_opening_an_artifact(empty: Isolated) -> None:
    with pytest.raises(MissingRequirementError, match="deploy build --accept-license empty"):
        command("empty", "exporters.worker")
    assert not empty.folder.exists()


def test_one_whose_interpreter_went_away_is_made_anew(empty: Isolated) -> None:
    prepare("empty")
    empty.python.unlink()
    empty.python.symlink_to(empty.folder / "gone")
    assert prepare("empty").exists()
