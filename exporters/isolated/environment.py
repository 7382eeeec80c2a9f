"""Virtual environments for runtimes whose requirements do not fit beside ours.

Each is made when it is first needed, from files pinned by hash, and kept in the cache folder. What runs in it
sees its own packages first and this project's code after them.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporters.cache_root import cache_root
from targets.errors import MissingRequirementError

Announce = Callable[[str], None]

INSTALL_SECONDS = 900
BOOT = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
"""Runs a module of this project, whose folder stands last: what the environment holds comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated:
    """An environment: its requirements as pip reads them, each with its hash, and where they have files.

    Dependencies are not followed: `requirements` is all that is installed.
    """

    name: str
    requirements: tuple[str, ...]
    system: str
    machine: str

    @property
    def possible(self) -> bool:
        """Whether this machine can hold it."""
        return (platform.system(), platform.machine()) == (self.system, self.machine)

    @property
    def folder(self) -> Path:
        """Where it lies: another set of requirements, another folder."""
        content = "\n".join([*self.requirements, platform.python_version()])
        return cache_root() / "isolated" / f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


ENVIRONMENTS = {
    "deepsparse": Isolated(
        name="deepsparse",
        requirements=(
            "deepsparse==1.8.0"
            " --hash=sha256:59a5ee321e93dbf05a9e8a91944daf7280409bfcdeb004253b018816d374261e",
            "numpy==1.26.4 --hash=sha256:666dbfb6ec68962c033a450943ded891bed2d54e6755e35e5835d63f4f6931d5",
        ),
        system="Linux",
        machine="x86_64",
    ),
}
"""By runtime. The engine of DeepSparse is one library that takes numpy; its package's other requirements
serve its pipelines and its telemetry, and are left out with them."""


def command(runtime: str, module: str) -> list[str]:
    """The start of a command that runs one of this project's modules with a runtime's own interpreter.

    Raises MissingRequirementError where it has an environment that is not made yet.
    """
    if runtime not in ENVIRONMENTS:
        return [sys.executable, "-P", "-m", module]
    isolated = ENVIRONMENTS[runtime]
    if not isolated.python.exists():
        raise MissingRequirementError(
            f"{runtime} has no environment on this machine",
            found=f"nothing at {isolated.folder}",
            expected="the one that a build makes once its licence is accepted",
            fix=f"deploy build --accept-license {runtime}",
        )
    project = Path(__file__).resolve().parents[2]
    return [str(isolated.python), "-I", "-c", BOOT, str(project), module]


def prepare(runtime: str, announce: Announce = lambda text: None) -> Path:
    """The interpreter of a runtime's environment, which is made first where it is not there yet.

    An environment appears whole or not at all; of two that are made at once one stays. Raises
    MissingRequirementError for a machine that cannot hold it, and where its files cannot be had.
    """
    isolated = ENVIRONMENTS[runtime]
    if not isolated.possible:
        raise MissingRequirementError(
            f"{runtime} cannot run here",
            found=f"{platform.system()} on {platform.machine()}",
            expected=f"{isolated.system} on {isolated.machine}",
            fix="choose another --runtime",
        )
    if not isolated.python.exists():
        announce(f"making an environment for {runtime}")
        _make(isolated)
    return isolated.python


def _make(isolated: Isolated) -> None:
    parent = cache_root() / "tmp"  # where a killed process's leftovers are swept
    try:
        parent.mkdir(parents=True, exist_ok=True)
        isolated.folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=parent) as scratch:
            made = Path(scratch) / "environment"
            listed = Path(scratch) / "requirements.txt"
            listed.write_text("\n".join(isolated.requirements) + "\n")
            _install(isolated.name, made, listed)
            _publish(made, isolated.folder)
    except OSError as error:
        raise MissingRequirementError(
            f"the environment of {isolated.name} cannot be written",
            found=error.strerror or str(error),
            expected=f"room in {parent}",
            fix="free space, or set EDGE_DEPLOY_CACHE",
        ) from error


def _install(name: str, made: Path, listed: Path) -> None:
    """By uv where it is there, which takes a tenth of the time; else, and where uv fails, by venv and pip."""
    python = str(made / "bin" / "python")
    wanted = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(listed)]
    own_pip = not _has_pip()  # installing one takes longer than all the rest
    pip = [python, "-m", "pip"] if own_pip else [sys.executable, "-m", "pip", "--python", python]
    by_pip = [
        [sys.executable, "-m", "venv", *([] if own_pip else ["--without-pip"]), str(made)],
        [*pip, "install", "-q", "--disable-pip-version-check", *wanted],
    ]
    if uv := shutil.which("uv"):
        by_uv = [
            [uv, "venv", "-q", "--python", sys.executable, str(made)],
            [uv, "pip", "install", "-q", "--python", python, *wanted],
        ]
        if _run(by_uv) is None:
            return
    if failed := _run(by_pip):
        raise MissingRequirementError(
            f"the environment of {name} cannot be made",
            found=failed,
            expected="its packages from the package index",
            fix="look at the network and at pip's settings, or build without this runtime",
        )


def _has_pip() -> bool:
    """Asked of the metadata: looking for the module itself lets setuptools take distutils' place."""
    try:
        return bool(importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _run(commands: list[list[str]]) -> str | None:
    """Runs them in turn; the last line that the first failing one wrote, None where all went well."""
    for words in commands:
        try:
            done = subprocess.run(
                words,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"no end after {INSTALL_SECONDS} s"
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error"))]
            return (errors or done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return None


def _publish(made: Path, folder: Path) -> None:
    """Moves it into place; one whose interpreter went away makes room, one that another made stays."""
    if folder.exists() and not (folder / "bin" / "python").exists():
        os.rename(folder, made.with_name("broken"))
    try:
        os.rename(made, folder)
    except OSError:
        if not (folder / "bin" / "python").exists():
            raise
