"""What a child process costs, ratios of interleaved runs with their spread, and results on disk."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.compare import median_interval
from deploy.environment import environment

ROOT = Path(__file__).parents[1]
DEPLOY = str(Path(sys.executable).with_name("deploy"))
SAMPLE_S = 0.05
ERROR_TAIL = 2000
LAUNCHER = """
import json, os, resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(int(sys.argv[1]), "w") as stream:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss], stream)
sys.exit(status if status >= 0 else 128 - status)
"""
PACKAGES = ("edge-deploy", "torch", "torchao", "executorch", "torch-pruning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU seconds (user and system) of a process and all it waited for; two peaks of memory.

    `peak_bytes` is the largest resident set of any one of them (ru_maxrss), `tree_bytes` the largest
    sum of proportional set sizes seen at once, sampled; 0 where the system does not tell.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    tree_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A median, the 95% interval of the median, and the smallest and largest run."""

    median: float
    interval: tuple[float, float]
    smallest: float
    largest: float
    runs: int


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Usage:
    """Runs a command to its end in the repository's root. Raises RuntimeError with its last words.

    A small launcher starts it: Linux counts the starter's own memory into a child's ru_maxrss.
    """
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as answer:
        handle = answer.fileno()
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(handle), *command],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[handle],
        )
        tree_bytes = _wait(process)
        wall_s = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            tail = log.read()[-ERROR_TAIL:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {tail}")
        answer.seek(0)
        cpu_s, peak = json.load(answer)
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(cpu_s=cpu_s, wall_s=wall_s, peak_bytes=peak * unit, tree_bytes=tree_bytes)


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Waits for the launcher; the most memory that all below it held at once, sampled."""
    tree_bytes = 0
    while process.poll() is None:
        tree_bytes = max(tree_bytes, sum(_tree_bytes(child) for child in _children(process.pid)))
        time.sleep(SAMPLE_S if tree_bytes else SAMPLE_S / 10)
    return tree_bytes


def _tree_bytes(pid: int) -> int:
    """Proportional set sizes of a process and all below it; what ends meanwhile counts as 0."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return own + sum(_tree_bytes(child) for child in _children(pid))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def interleaved(
    makers: Mapping[str, Callable[[int], Usage]], *, runs: int, warm_up: int = 1
) -> dict[str, list[Usage]]:
    """Each maker's runs, taken in turn, every other round in reverse order.

    `warm_up` rounds come first and are thrown away. A maker is called with the number of its round.
    """
    results: dict[str, list[Usage]] = {name: [] for name in makers}
    for turn in range(-warm_up, runs):
        for name in list(makers)[:: 1 if turn % 2 == 0 else -1]:
            usage = makers[name](turn)
            if turn >= 0:
                results[name].append(usage)
            print(f"{name}: {usage.cpu_s:.3f} CPU s", file=sys.stderr)
    return results


def summarise(samples: Sequence[float]) -> Summary:
    """The median with its distribution-free 95% interval; fewer than 6 samples give their range."""
    values = np.asarray(samples, np.float64)
    low, high = median_interval(values)
    return Summary(
        median=float(np.median(values)),
        interval=(low, high),
        smallest=float(values.min()),
        largest=float(values.max()),
        runs=len(values),
    )


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each pair: what slowed the machine down in a round slowed both."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def parser(description: str | None, *, runs: int, least: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""

    def count(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"at least {least} runs, or the spread says nothing")
        return number

    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--runs", type=count, default=runs, metavar="N", help=f"measured runs [{runs}]")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("-o", "--output-dir", type=Path, help="also write the result to NAME.json in here")
    return made


def record(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A result with what it was measured on, when, and by which command line."""
    found = environment()
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shown_command(name, sys.argv[1:]),
        "machine": {
            "cpu": found.cpu,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "os": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "packages": {key: found.packages[key] for key in PACKAGES if key in found.packages},
        **body,
    }


def shown_command(name: str, arguments: Sequence[str]) -> str:
    """The command line without the folders of this machine."""
    shown = [Path(word).name if os.path.isabs(word) else word for word in arguments]
    return " ".join(["python -m", f"benchmarks.{name}", *shown])


def deliver(result: Mapping[str, Any], table: str, arguments: argparse.Namespace) -> None:
    """Prints the table, or the JSON, and writes the JSON where it was asked for."""
    text = json.dumps(result, indent=1) + "\n"
    print(text if arguments.json else table)
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / f"{result['benchmark']}.json").write_text(text, encoding="utf-8")


def plain(value: Any) -> dict[str, Any]:
    """A frozen value as JSON takes it."""
    return asdict(value)
