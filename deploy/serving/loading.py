"""A build folder opened for serving: files checked, artifact loaded, golden pair held."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.spec import TensorSpec
from deploy.builds import check_files, golden_pair, require_golden, specs_of
from deploy.cache import file_digest
from deploy.manifest import Manifest, read
from exporters.base import EXPORTERS, Session, find_runtime
from targets.errors import MissingRequirementError

Array = np.ndarray[Any, Any]

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An open build. `version` is its manifest's hash, shortened: another build, another version."""

    folder: Path
    manifest: Manifest
    version: str
    specs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    session: Session
    golden: dict[str, Array]
    stamp: tuple[int, int]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.model

    @property
    def median_ms(self) -> float | None:
        """What the build measured for one call, None where it did not."""
        shipped = next(r for r in self.manifest.rungs if r.name == self.manifest.shipped_rung)
        return shipped.latency.median_ms


def load(folder: Path, *, threads: int | None = None) -> Loaded:
    """Opens a build.

    Raises IntegrityError for changed files, WrongOutputsError where the golden pair does not hold, and
    MissingRequirementError where the runtime is absent.
    """
    stamp = stamp_of(folder)
    manifest = read(folder)
    program = check_files(folder, manifest)
    specs = specs_of(manifest)
    outputs = tuple(output.name for output in manifest.outputs)
    _require_servable(folder, manifest)
    session = find_runtime(manifest.runtime).open(
        program,
        inputs=specs,
        outputs=outputs,
        threads=threads or manifest.recommended.threads,
        spinning=False,
    )
    inputs, expected = golden_pair(folder)
    require_golden(folder, manifest, session.run(inputs), expected)
    version = file_digest(folder / MANIFEST)[:12]
    return Loaded(
        folder=folder,
        manifest=manifest,
        version=version,
        specs=specs,
        outputs=outputs,
        session=session,
        golden=inputs,
        stamp=stamp,
    )


def _require_servable(folder: Path, manifest: Manifest) -> None:
    """Raises MissingRequirementError for a runtime that lives in an environment of its own."""
    entry = EXPORTERS.get(manifest.runtime)
    if entry is not None and entry.isolated:
        raise MissingRequirementError(
            f"{folder} cannot be served",
            found=f"the runtime {manifest.runtime}, which runs apart and whose licence is not for production",
            expected="a build for one of "
            + ", ".join(name for name, each in EXPORTERS.items() if each.serves),
            fix="deploy build without --accept-license ships the fastest of these",
        )


def stamp_of(folder: Path) -> tuple[int, int]:
    """What changes when another build is published: the manifest's inode and time. (0, 0) without one."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return (0, 0)
    return (status.st_ino, status.st_mtime_ns)
