"""A build folder read again, by what imports neither torch nor anything that builds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration import compare
from calibration.spec import TensorSpec
from deploy.cache import file_digest
from deploy.manifest import Manifest
from targets.errors import IntegrityError, WrongOutputsError

Array = np.ndarray[Any, Any]

GOLDEN = ("inputs.npz", "expected.npz")
MIN_SNR_DB = {
    "float32": 80.0,
    "float16": 45.0,
    "bfloat16": 30.0,
    "int8": 15.0,
    "int8-dynamic": 15.0,
    "int4": 10.0,
}
"""How well outputs of each precision must agree with what they stand for."""


def check_files(folder: Path, manifest: Manifest) -> Path:
    """The program's path, after every file was held against its hash. Raises IntegrityError."""
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(f"{file.path} is missing from {folder}", fix="build again")
        if file_digest(path) != file.sha256:
            raise IntegrityError(
                f"{file.path} is not what the manifest says", expected=file.sha256, fix="build again"
            )
    return next(folder / file.path for file in manifest.files if file.role == "program")


def golden_pair(folder: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and the outputs that the artifact answered when it was built. Raises IntegrityError."""
    return _arrays(folder / GOLDEN[0]), _arrays(folder / GOLDEN[1])


def specs_of(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """The inputs, in the artifact's order."""
    return tuple(
        TensorSpec(
            name=entry.name,
            shape=tuple(entry.shape),
            dtype=entry.dtype,
            bounds={name: (low, high) for name, (low, high) in entry.dynamic.items()},
        )
        for entry in manifest.inputs
    )


def require_golden(
    folder: Path, manifest: Manifest, answers: Mapping[str, Array], expected: Mapping[str, Array]
) -> float:
    """The SNR of answers to the golden inputs, in dB. Raises WrongOutputsError where it is too low.

    The same artifact on another machine may round otherwise: it is judged like its precision.
    """
    snr_db = min(compare.snr_db(expected[name], answers[name]) for name in expected)
    least = MIN_SNR_DB[manifest.precision]
    if snr_db < least:
        raise WrongOutputsError(
            f"the golden pair of {folder} does not hold here",
            found=f"{snr_db:.1f} dB SNR",
            expected=f"at least {least:g} dB in {manifest.precision}",
            fix="compare the runtime's version with the manifest's, and build again",
        )
    return snr_db


def _arrays(file: Path) -> dict[str, Array]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"the golden pair's {file.name} cannot be read: {error}", fix="build again"
        ) from error
