"""One build per real project, through the command, as a user runs it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy import manifest
from deploy.manifest import Manifest, Report, Rung

TARGET = "galaxy-s22"
OUTPUT = "out"
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """How a build of the project in `work` ended; its folder holds a build when `code` is 0."""

    name: str
    work: Path
    code: int
    stdout: str
    stderr: str

    @property
    def folder(self) -> Path:
        """Where the build lies."""
        return self.work / OUTPUT / self.name / TARGET

    @property
    def manifest(self) -> Manifest:
        """Its manifest.json."""
        return manifest.read(self.folder)

    @property
    def report(self) -> Report:
        """Its report.json."""
        return msgspec.json.decode((self.folder / "report.json").read_bytes(), type=Report)

    @property
    def rungs(self) -> dict[str, Rung]:
        """All that were measured, by name."""
        return {rung.name: rung for rung in self.manifest.rungs}

    @property
    def shipped(self) -> Rung:
        """The rung that was published."""
        return self.rungs[self.manifest.shipped_rung]


def build(work: Path, cache: Path) -> Built:
    """Runs `deploy build` in a prepared project, with a cache of its own."""
    command = [sys.executable, "-m", "deploy.cli.main", "build", "--target", TARGET, "-o", OUTPUT, "--json"]
    environment = {**os.environ, "EDGE_DEPLOY_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    return Built(name=work.name, work=work, code=done.returncode, stdout=done.stdout, stderr=done.stderr)
