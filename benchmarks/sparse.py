"""What zeros bring where a kernel skips them, and what they cost where none does.

    python -m benchmarks.sparse [--runs N] [--threads N] [-o FOLDER]

ResNet-50 by magnitude masks, the same share of every inner layer, in DeepSparse against dense float32 in ONNX
Runtime and against its own dense twin, at batches of 1 and 16; weights are random, so that times mean
something here and accuracy does not. Then a product of matrices by torch's CSR kernels against the dense one
at 50, 70, 90 and 95% zeros. Sessions are called in rounds whose order alternates. DeepSparse's licence is
accepted by running this (see docs/servers.md).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import render
from benchmarks.gains import prepared, rounds_of
from benchmarks.measuring import deliver, parser, plain, ratios, record, summarise
from calibration.spec import TensorSpec
from exporters.base import Quantization, find_exporter
from exporters.deepsparse import dense_twin
from exporters.isolated.environment import prepare
from exporters.onnx import OnnxModel, to_onnx
from exporters.remote import RemoteSession

REFERENCE = "onnxruntime dense float32"
SHARES = (0.8, 0.9, 0.95)
INT8_SHARE = 0.9
BATCHES = (1, 16)
GOALS = {
    "deepsparse 90% float32": {1: 1.7, 16: 4.6},
    "deepsparse 90% int8": {1: 4.3, 16: 5.1},
}
SPEC = TensorSpec(name="image", shape=("batch", 3, 224, 224), bounds={"batch": (1, 16)})
CALIBRATION = 4
CSR_SHARES = (0.5, 0.7, 0.9, 0.95)
CSR_SIZE = 1024
CSR_COLUMNS = (1, 16, 128)

Files = dict[str, tuple[str, Path]]


def sources(folder: Path) -> dict[float, OnnxModel]:
    """ResNet-50 as ONNX by its share of zeros; 0.0 is the dense one."""
    from deploy.model import load_module
    from deploy.project import load
    from deploy.pruning.masks import apply_, magnitude_masks
    from exporters.capture import capture

    project = load(prepared("resnet50", folder))
    made = {}
    for share in (0.0, *SHARES):
        module = load_module(project)
        if share:
            apply_(module, magnitude_masks(module, sparsity=share, ranking="local", exclude=()))
        made[share] = to_onnx(capture(module, [SPEC]), folder / f"{share}.onnx")
        print(f"ResNet-50 with {share:.0%} zeros", file=sys.stderr)
    return made


def artifacts(models: Mapping[float, OnnxModel], folder: Path) -> Files:
    """Every candidate's runtime and file."""
    files: Files = {}

    def add(name: str, runtime: str, share: float, precision: str = "float32") -> Path:
        exporter = find_exporter(runtime)
        file = folder / f"{name.replace(' ', '-')}{exporter.suffix}"
        exporter.export(
            models[share],
            precision=precision,
            calibration=_calibration(),
            quantization=Quantization(),
            file=file,
        )
        files[name] = (runtime, file)
        print(f"exported {name}", file=sys.stderr)
        return file

    prepare("deepsparse", lambda text: print(text, file=sys.stderr))
    add(REFERENCE, "onnxruntime", 0.0)
    add("onnxruntime dense int8", "onnxruntime", 0.0, "int8")
    add("onnxruntime 90% float32", "onnxruntime", 0.9)
    add("deepsparse dense float32", "deepsparse", 0.0)
    for share in SHARES:
        add(f"deepsparse {share:.0%} float32", "deepsparse", share)
    sparse = add(f"deepsparse {INT8_SHARE:.0%} int8", "deepsparse", INT8_SHARE, "int8")
    twin = folder / "twin.onnx"
    dense_twin(sparse, twin)
    files["deepsparse dense int8"] = ("deepsparse", twin)
    return files


def _calibration() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {"image": generator.standard_normal((1, 3, 224, 224)).astype(np.float32)} for _ in range(CALIBRATION)
    ]


def timed(files: Files, batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each candidate: its time, and how much faster than the reference."""
    inputs = {"image": np.random.default_rng(1).standard_normal((batch, 3, 224, 224)).astype(np.float32)}
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                RemoteSession(runtime, file, inputs=[SPEC], outputs=["output"], threads=threads)
            )
            for name, (runtime, file) in files.items()
        }
        for session in sessions.values():
            session.prepare(inputs)
        times = rounds_of(sessions, rounds)
    return [
        {
            "name": name,
            "batch": batch,
            "latency_ms": plain(summarise(samples)),
            "gain": plain(summarise(ratios(times[REFERENCE], samples))),
            "goal": GOALS.get(name, {}).get(batch),
        }
        for name, samples in times.items()
    ]


def csr(rounds: int, threads: int) -> list[dict[str, Any]]:
    """The time of a CSR product over the dense product's, by share of zeros and columns."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for columns in CSR_COLUMNS:
        x = torch.randn(CSR_SIZE, columns, generator=generator)
        dense = torch.randn(CSR_SIZE, CSR_SIZE, generator=generator)
        kinds: dict[float, Any] = {0.0: dense}
        for share in CSR_SHARES:
            kept = torch.rand(dense.shape, generator=generator) >= share
            kinds[share] = (dense * kept).to_sparse_csr()
        times = _products(kinds, x, rounds)
        rows += [
            {"zeros": share, "columns": columns, "slower": plain(summarise(ratios(times[share], times[0.0])))}
            for share in CSR_SHARES
        ]
    return rows


def _products(kinds: Mapping[float, Any], x: Any, rounds: int) -> dict[float, list[float]]:
    import torch

    times: dict[float, list[float]] = {share: [] for share in kinds}
    with torch.inference_mode():
        for turn in range(-3, rounds):
            for share in list(kinds)[:: 1 if turn % 2 == 0 else -1]:
                started, calls = time.perf_counter(), 0
                while time.perf_counter() - started < 0.01:
                    kinds[share] @ x
                    calls += 1
                if turn >= 0:
                    times[share].append((time.perf_counter() - started) / calls)
    return times


def options() -> argparse.ArgumentParser:
    """The common options, and threads."""
    made = parser(__doc__, runs=15, least=7)
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every session [1]")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Exports, measures and prints."""
    arguments = options().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = artifacts(sources(folder), folder)
        rows = [row for batch in BATCHES for row in timed(files, batch, arguments.runs, arguments.threads)]
    body = {"rows": rows, "csr": csr(arguments.runs, arguments.threads), "threads": arguments.threads}
    result = record("sparse", body)
    deliver(result, render.sparse(result), arguments)


if __name__ == "__main__":
    main()
