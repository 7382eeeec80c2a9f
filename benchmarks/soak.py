"""A server under twice the load that it can carry: every answer right, memory and waiting bounded.

    python -m benchmarks.soak [--build FOLDER] [--seconds N] [-o FOLDER]

Measures what the server answers a second when asked as fast as it can, then sends twice that rate, open loop,
for the time given: 10 minutes by default. Every answer with status 200 is compared with what is expected;
429 is the only other status that may come. Without --build, examples/digits in float32 is served.
"""

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import render
from benchmarks.measuring import deliver, parser, record
from benchmarks.server import built, request_of, serving

SECONDS = 600
OVERLOAD = 2.0
CONNECTIONS = 128
PROBE_S = 5.0
TOLERANCE = 1e-4
MEMORY_MB = 50.0


class Load:
    """What came back so far."""

    def __init__(self, expected: list[float]) -> None:
        self._expected = expected
        self.statuses: Counter[int] = Counter()
        self.wrong = 0
        self.milliseconds: list[float] = []

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        """One request; its time counts from when it was sent."""
        sent = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None
        body = await reader.readexactly(int(length[1]))
        status = int(head.split(b" ", 2)[1])
        self.statuses[status] += 1
        if status == 200:
            self.milliseconds.append(1000 * (time.perf_counter() - sent))
            answer = json.loads(body)["outputs"][0]["data"]
            self.wrong += not np.allclose(answer, self._expected, atol=TOLERANCE)


async def saturated(port: int, request: bytes, load: Load, seconds: float) -> float:
    """Requests a second when asked as fast as it can."""
    until = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            await load.one(reader, writer, request)
        writer.close()

    await asyncio.gather(*(client() for _ in range(32)))
    return load.statuses[200] / seconds


async def overloaded(port: int, request: bytes, load: Load, rate: float, seconds: float) -> None:
    """Requests at a rate, spread over many connections; a late one is sent at once."""
    started = time.perf_counter()
    number = iter(range(int(rate * seconds)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in number:
            due = started + index / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await load.one(reader, writer, request)
            if time.perf_counter() - started > seconds:
                break
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


def resident_mb(pid: int) -> float:
    """A process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def measure(build: Path, seconds: float) -> dict[str, Any]:
    """The load, the answers, the memory."""
    request = request_of(build)
    with np.load(build / "expected.npz") as arrays:
        expected = next(iter(arrays.values()))[:1].ravel().tolist()
    with tempfile.TemporaryDirectory() as folder, serving(build, Path(folder) / "log") as (pid, port):
        capacity = asyncio.run(saturated(port, request, Load(expected), PROBE_S))
        before, load = resident_mb(pid), Load(expected)
        print(f"{capacity:.0f} a second; twice that for {seconds:g} s", file=sys.stderr)
        asyncio.run(overloaded(port, request, load, OVERLOAD * capacity, seconds))
        after = resident_mb(pid)
    p50, p99 = np.percentile(load.milliseconds, [50, 99])
    return {
        "seconds": seconds,
        "capacity": capacity,
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "wrong": load.wrong,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "memory_mb": [before, after],
        "met": load.wrong == 0 and set(load.statuses) <= {200, 429} and after - before < MEMORY_MB,
    }


def options() -> argparse.ArgumentParser:
    """The build and the time."""
    made = parser(__doc__, runs=1, least=1)
    made.add_argument("--build", type=Path, help="serve this build")
    made.add_argument("--seconds", type=float, default=SECONDS, help="how long")
    return made


def main(words: list[str] | None = None) -> None:
    """Serves, asks too much and prints."""
    arguments = options().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        build = arguments.build or built(Path(scratch))
        result = record("soak", measure(build, arguments.seconds))
    deliver(result, render.soak(result), arguments)


if __name__ == "__main__":
    main()
