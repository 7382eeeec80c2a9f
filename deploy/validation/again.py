"""`deploy validate`: a finished build looked at again: its files, its answers, its latency."""

import datetime
import os
from pathlib import Path
from typing import Any

import numpy as np

from calibration import compare
from calibration.spec import TensorSpec
from deploy.cache import file_digest
from deploy.disk import disk_error
from deploy.environment import this_machine
from deploy.manifest import Latency, Manifest, Measurement, encode, read
from deploy.validation.latency import time_interleaved
from deploy.validation.remote import RemoteSession
from deploy.validation.rung import MIN_SNR_DB
from targets.errors import DeviceError, IntegrityError, WrongOutputsError

HOST = "host"
GOLDEN = ("inputs.npz", "expected.npz")


def validate_build(folder: Path, *, device: str = HOST) -> Measurement:
    """Checks hashes, runs the golden pair, times the artifact, and keeps the result beside the build.

    Raises IntegrityError for a changed file, WrongOutputsError when the golden pair does not hold, and
    DeviceError for devices that this version does not speak to. The manifest is not touched.
    """
    manifest = read(folder)
    if device != HOST:
        raise DeviceError(
            f"the device {device!r} cannot be asked",
            found="a version of edge-deploy that measures on this machine only",
            expected=HOST,
            fix="run deploy validate BUILD --device host; what needs the device stays unmeasured",
        )
    program = check_files(folder, manifest)
    inputs, expected = (_arrays(folder / name) for name in GOLDEN)
    specs = [_spec(entry) for entry in manifest.inputs]
    outputs = [output.name for output in manifest.outputs]
    threads = manifest.recommended.threads
    with RemoteSession(manifest.runtime, program, inputs=specs, outputs=outputs, threads=threads) as session:
        answers = session.run(inputs)
        snr_db = min(compare.snr_db(expected[name], answers[name]) for name in outputs)
        error = max(compare.max_abs_error(expected[name], answers[name]) for name in outputs)
        _require_golden(folder, manifest, snr_db)
        session.prepare({name: array[: manifest.recommended.batch] for name, array in inputs.items()})
        timing = time_interleaved({manifest.shipped_rung: session})[manifest.shipped_rung]
        peak = session.peak_bytes()
    measurement = Measurement(
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        rung=manifest.shipped_rung,
        device=HOST,
        golden_snr_db=round(snr_db, 2),
        golden_max_abs_error=error,
        latency=Latency(
            median_ms=timing.median_ms,
            p90_ms=timing.p90_ms,
            p99_ms=timing.p99_ms,
            ci95_ms=list(timing.interval),
            samples=timing.samples,
            threads=threads,
            measured_on=this_machine(),
        ),
        peak_memory_bytes=peak,
    )
    _keep(folder, measurement)
    return measurement


def check_files(folder: Path, manifest: Manifest) -> Path:
    """The program's path, after every file was held against its hash."""
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(f"{file.path} is missing from {folder}", fix="build again")
        if file_digest(path) != file.sha256:
            raise IntegrityError(
                f"{file.path} is not what the manifest says", expected=file.sha256, fix="build again"
            )
    return next(folder / file.path for file in manifest.files if file.role == "program")


def _arrays(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"the golden pair's {file.name} cannot be read: {error}", fix="build again"
        ) from error


def _spec(entry: Any) -> TensorSpec:
    bounds = {name: (low, high) for name, (low, high) in entry.dynamic.items()}
    return TensorSpec(name=entry.name, shape=tuple(entry.shape), dtype=entry.dtype, bounds=bounds)


def _require_golden(folder: Path, manifest: Manifest, snr_db: float) -> None:
    """The same artifact on another machine may round otherwise: judged like its precision."""
    least = MIN_SNR_DB[manifest.precision]
    if snr_db < least:
        raise WrongOutputsError(
            f"the golden pair of {folder} does not hold here",
            found=f"{snr_db:.1f} dB SNR",
            expected=f"at least {least:g} dB in {manifest.precision}",
            fix="compare the runtime's version with the manifest's, and build again",
        )


def _keep(folder: Path, measurement: Measurement) -> None:
    target = folder / "measurements"
    stamp = measurement.created_at.replace(":", "").replace("-", "")
    scratch = target / f".new-{stamp}"
    try:
        target.mkdir(exist_ok=True)
        scratch.write_bytes(encode(measurement))
        os.replace(scratch, target / f"{measurement.device}-{stamp}.json")
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise disk_error(error, folder) from error
