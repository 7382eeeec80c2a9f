"""`deploy validate`: a finished build looked at again: its files, its answers, its latency."""

import datetime
import os
from pathlib import Path

from calibration import compare
from deploy.builds import check_files, golden_pair, require_golden, specs_of
from deploy.disk import disk_error
from deploy.environment import this_machine
from deploy.manifest import Latency, Measurement, encode, read
from deploy.validation.latency import time_interleaved
from exporters.remote import RemoteSession
from targets.errors import DeviceError

HOST = "host"


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
    inputs, expected = golden_pair(folder)
    specs = specs_of(manifest)
    outputs = [output.name for output in manifest.outputs]
    threads = manifest.recommended.threads
    with RemoteSession(manifest.runtime, program, inputs=specs, outputs=outputs, threads=threads) as session:
        answers = session.run(inputs)
        snr_db = require_golden(folder, manifest, answers, expected)
        error = max(compare.max_abs_error(expected[name], answers[name]) for name in outputs)
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
