"""What a request costs the server beyond the model: CPU time over the raw call, at several concurrencies.

    python -m benchmarks.server [--build FOLDER] [--requests N] [-o FOLDER]

Builds examples/digits for this machine (float32, ONNX Runtime) unless a build is named, serves it with
everything on, and asks it over kept-alive connections. The CPU seconds are the server process's own, from the
kernel; what the same number of raw calls cost in a process without a server is taken off. Concurrencies take
turns in rounds.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import render
from benchmarks.measuring import ROOT, deliver, parser, plain, record, summarise

CONCURRENCIES = (1, 8, 32)
LIMIT_US = 200.0
TICKS = os.sysconf("SC_CLK_TCK")
START_S = 60.0


def built(folder: Path) -> Path:
    """examples/digits for this machine."""
    words = ["--runtime", "onnxruntime", "--no-ladder", "--precision", "float32", "--pattern", "none", "-q"]
    source = str(ROOT / "examples" / "digits")
    command = [sys.executable, "-P", "-m", "deploy.cli.main", "build", "-c", source, "--target", "host"]
    subprocess.run([*command, "-o", str(folder), *words], check=True)
    return folder / "digits" / "host"


@contextmanager
def serving(build: Path, log: Path) -> Iterator[tuple[int, int]]:
    """The process and port of a server."""
    command = [sys.executable, "-P", "-m", "deploy.cli.main", "serve", str(build), "--port", "0"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream)
    try:
        until = time.monotonic() + START_S
        while not (found := re.search(r"listening on http://[\d.]+:(\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        time.sleep(0.5)
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.wait()


def request_of(build: Path) -> bytes:
    """A whole HTTP request for the first golden sample, as JSON."""
    manifest = json.loads((build / "manifest.json").read_text())
    with np.load(build / "inputs.npz") as arrays:
        inputs = [
            {
                "name": entry["name"],
                "shape": [1, *arrays[entry["name"]].shape[1:]],
                "datatype": "FP32",
                "data": arrays[entry["name"]][:1].ravel().tolist(),
            }
            for entry in manifest["inputs"]
        ]
    body = json.dumps({"inputs": inputs}).encode()
    path = f"/v2/models/{manifest['model']}/infer"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(port: int, request: bytes, requests: int, concurrency: int) -> None:
    """So many requests over as many kept-alive connections."""
    left = iter(range(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = re.search(rb"content-length: (\d+)", head.lower())
            assert length is not None
            await reader.readexactly(int(length[1]))
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(concurrency)))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def raw_call_us(build: Path, calls: int) -> float:
    """CPU microseconds of one call of the model, called alone in this process."""
    from deploy.serving.loading import load

    loaded = load(build)
    sample = {name: array[:1] for name, array in loaded.golden.items()}
    for _ in range(calls // 10):
        loaded.session.run(sample)
    start = time.process_time()
    for _ in range(calls):
        loaded.session.run(sample)
    return (time.process_time() - start) / calls * 1e6


def measure(build: Path, requests: int, runs: int) -> dict[str, Any]:
    """Microseconds by concurrency, and requests a second."""
    request = request_of(build)
    spent: dict[int, list[float]] = {count: [] for count in CONCURRENCIES}
    rates: dict[int, list[float]] = {count: [] for count in CONCURRENCIES}
    raw: list[float] = []
    with tempfile.TemporaryDirectory() as folder, serving(build, Path(folder) / "log") as (pid, port):
        for turn in range(runs + 1):
            raw.append(raw_call_us(build, requests))
            for count in CONCURRENCIES[:: 1 if turn % 2 else -1]:
                cpu, wall = cpu_seconds(pid), time.perf_counter()
                asyncio.run(ask(port, request, requests, count))
                if turn:  # the first round warms up
                    spent[count].append((cpu_seconds(pid) - cpu) / requests * 1e6)
                    rates[count].append(requests / (time.perf_counter() - wall))
                print(f"{count} at once: round {turn}", file=sys.stderr)
    alone = float(np.median(raw))
    return {
        "raw_us": plain(summarise(raw)),
        "limit_us": LIMIT_US,
        "requests": requests,
        "rows": [
            {
                "concurrency": count,
                "over_us": plain(summarise([each - alone for each in spent[count]])),
                "per_second": plain(summarise(rates[count])),
            }
            for count in CONCURRENCIES
        ],
    }


def cost_per_million(rows: list[dict[str, Any]], price_per_hour: float) -> float:
    """What a million answers cost at the best rate, in the currency of the price.

    The rate is of a machine that also runs the client: on one that only serves it is higher.
    """
    best = max(row["per_second"]["median"] for row in rows)
    return 1e6 / (3600 * best) * price_per_hour


def options() -> argparse.ArgumentParser:
    """The common options, the build and the requests of a round."""
    made = parser(__doc__, runs=9, least=6)
    made.add_argument("--build", type=Path, help="serve this build")
    made.add_argument("--requests", type=int, default=4000, help="requests of a round")
    made.add_argument(
        "--price-per-hour", type=float, help="of this machine: tells what a million answers cost"
    )
    return made


def main(words: list[str] | None = None) -> None:
    """Serves, asks and prints."""
    arguments = options().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        build = arguments.build or built(Path(scratch))
        measured = measure(build, arguments.requests, arguments.runs)
    if arguments.price_per_hour is not None:
        measured["per_million"] = cost_per_million(measured["rows"], arguments.price_per_hour)
    result = record("server", measured)
    deliver(result, render.server(result), arguments)


if __name__ == "__main__":
    main()
