"""The wheel holds the four packages whole, and works without the sources."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("targets", "calibration", "exporters", "deploy")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")


def files_of_packages() -> set[str]:
    """What git tracks or would track below the four packages."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in place leaves its folder in the tree, and old files in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in sorted(files_of_packages() | set(BESIDE)):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    for stranger in ("tests", "examples", "benchmarks", "docs"):
        (folder / "source" / stranger).mkdir()
        (folder / "source" / stranger / "stray.py").touch()
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder / "out")]
    ended = subprocess.run(
        [sys.executable, *words, str(folder / "source")], capture_output=True, check=False, text=True
    )
    assert ended.returncode == 0, ended.stderr
    (built,) = (folder / "out").glob("edge_deploy-*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    own = files_of_packages()
    kinds = {Path(name).suffix for name in own}
    assert {".py", ".toml", ".css", ".typed"} <= kinds
    assert own - names_in(wheel) == set()


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    foreign = {name for name in names_in(wheel) - files_of_packages() if ".dist-info/" not in name}
    assert foreign == set()


def test_the_wheel_asks_for_little_without_an_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    core = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(core) == len(pyproject()["dependencies"]) <= 6
    assert not any(heavy in line for line in core for heavy in ("torch", "executorch", "transformers"))


def test_the_installed_wheel_finds_its_data(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import targets.catalog, deploy.reporting.html; from pathlib import Path; "
        "print(targets.catalog.__file__); print(targets.catalog.find('galaxy-s22').title)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    file, title = ended.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert title == "Samsung Galaxy S22"


def test_version_is_that_of_pyproject() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "--version"], capture_output=True, check=True, text=True
    )
    assert ended.stdout.split()[-1] == pyproject()["version"]


def test_all_is_every_extra_a_user_may_need() -> None:
    extras = pyproject()["optional-dependencies"]
    (everything,) = extras["all"]
    named = everything.partition("[")[2].rstrip("]").split(",")
    assert set(named) == extras.keys() - {"all", "dev"}
    assert "edge-deploy[all]" in extras["dev"]


def pyproject() -> dict:  # type: ignore[type-arg]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(project, dict)
    return project
