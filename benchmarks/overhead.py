"""What `deploy build` costs over a bare script that calls the same libraries for the same programs.

    python -m benchmarks.overhead [--runs N] [--json] [-o FOLDER]

`deploy build --pattern none` of examples/digits with an empty cache against benchmarks/bare_build.py, in
interleaved pairs, one thread for torch on both sides. The build times its rungs on purpose; those calls are
subtracted in one of the two ratios: samples x median of each rung, and its warm-up.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import render
from benchmarks.measuring import (
    DEPLOY,
    ROOT,
    Usage,
    deliver,
    interleaved,
    parser,
    plain,
    ratios,
    record,
    run_child,
    summarise,
)
from deploy.manifest import Manifest, Report, read
from deploy.validation.latency import WARM_UP_S

CPU_LIMIT = 1.15
MEMORY_LIMIT = 1.2
BUILD = ["build", "-c", "examples/digits", "--target", "galaxy-s22", "--pattern", "none", "--quiet"]
BARE = str(ROOT / "benchmarks" / "bare_build.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def build_once(folder: Path) -> tuple[Usage, Path]:
    """A build that finds nothing in the cache, and its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    env = {**ONE_THREAD, "EDGE_DEPLOY_CACHE": str(folder / "cache")}
    usage = run_child([DEPLOY, *BUILD, "-o", str(folder / "build")], env=env)
    return usage, folder / "build" / "digits" / "galaxy-s22"


def bare_once(folder: Path) -> Usage:
    """The bare script's run."""
    shutil.rmtree(folder, ignore_errors=True)
    return run_child([sys.executable, BARE, str(folder)], env=ONE_THREAD)


def sampling_s(manifest: Manifest) -> float:
    """Seconds in which the build called its rungs only to time them."""
    timed = [rung.latency for rung in manifest.rungs if rung.latency.median_ms is not None]
    return sum(each.samples * (each.median_ms or 0.0) / 1e3 + WARM_UP_S for each in timed)


def require_same_result(report: Report, bare: Path) -> dict[str, Any]:
    """Sizes and accuracies of both sides. Raises RuntimeError when the build made something else."""
    accuracies = json.loads((bare / "accuracies.json").read_text())
    found = {}
    for rung, name in (("dense-float", "float32"), ("dense-int8", "int8")):
        built = next(each for each in report.manifest.rungs if each.name == rung)
        file = bare / f"{name}.pte"
        if built.accuracy.value is None or abs(built.accuracy.value - accuracies[name]) > 1e-9:
            raise RuntimeError(f"{rung}: the build has {built.accuracy.value}, the script {accuracies[name]}")
        found[name] = {
            "build_bytes": built.size_bytes,
            "bare_bytes": file.stat().st_size,
            "accuracy": built.accuracy.value,
        }
    return found


def measure(runs: int, folder: Path) -> dict[str, Any]:
    """Ratios of interleaved pairs, what was sampled in each build, and where a build's time went."""
    sampled: dict[int, float] = {}
    stages: list[dict[str, float]] = []

    def build(turn: int) -> Usage:
        usage, made = build_once(folder / "tool")
        sampled[turn] = sampling_s(read(made))
        if turn >= 0:
            stages.append({each.name: each.seconds for each in _report(made).stages})
        return usage

    makers = {"build": build, "bare": lambda turn: bare_once(folder / "bare")}
    measured = interleaved(makers, runs=runs)
    same = require_same_result(_report(folder / "tool" / "build" / "digits" / "galaxy-s22"), folder / "bare")
    return {
        **compared(measured, [sampled[turn] for turn in range(runs)]),
        "same": same,
        "stages": _medians(stages),
    }


def compared(measured: dict[str, list[Usage]], sampled: list[float]) -> dict[str, Any]:
    """The ratios, and what both sides took."""
    build, bare = measured["build"], measured["bare"]
    cpu, reference = [u.cpu_s for u in build], [u.cpu_s for u in bare]
    working = [spent - timing for spent, timing in zip(cpu, sampled, strict=True)]
    return {
        "limits": {"cpu": CPU_LIMIT, "memory": MEMORY_LIMIT},
        "cpu_s": {"build": plain(summarise(cpu)), "bare": plain(summarise(reference))},
        "sampling_s": plain(summarise(sampled)),
        "cpu_ratio": plain(summarise(ratios(working, reference))),
        "cpu_ratio_with_sampling": plain(summarise(ratios(cpu, reference))),
        "memory_ratio": plain(summarise(ratios([u.peak_bytes for u in build], [u.peak_bytes for u in bare]))),
        "tree_memory_ratio": plain(
            summarise(ratios([u.tree_bytes for u in build], [u.tree_bytes for u in bare]))
        ),
        "peak_bytes": {
            name: plain(summarise([u.peak_bytes for u in each])) for name, each in measured.items()
        },
    }


def _report(folder: Path) -> Report:
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)


def _medians(stages: list[dict[str, float]]) -> dict[str, float]:
    """Wall seconds of each stage."""
    return {name: round(float(np.median([each[name] for each in stages])), 3) for name in stages[0]}


def main(words: list[str] | None = None) -> None:
    """Measures and prints."""
    arguments = parser(__doc__, runs=7, least=5).parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        result = record("overhead", measure(arguments.runs, Path(folder)))
    deliver(result, render.overhead(result), arguments)


if __name__ == "__main__":
    main()
