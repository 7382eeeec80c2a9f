"""What `deploy build --pattern none` does for examples/digits, written by hand against the libraries.

    python benchmarks/bare_build.py FOLDER

Writes the dense float32 and int8 programs into FOLDER, calibrated on the same samples, judges both and the
module on the same data; accuracies.json has what came out. No cache, no report, no comparison of outputs, no
process for the runtime: the least that gives the same two programs. It imports nothing of this project.
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from safetensors.torch import load_file
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

PROJECT = Path(__file__).parents[1] / "examples" / "digits"
SCALE = 0.0625
CALIBRATION_BATCH = 32
BATCH = 64

Predict = Callable[[Tensor], Tensor]


def main(folder: Path) -> None:
    """Both programs in the folder, and the accuracy of each and of the module."""
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    module = load_module()
    calibration, _ = load_data("calibration")
    images, labels = load_data("evaluation")
    # With these libraries on, a traced convolution limits the batch to 15.
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        floating = export_module(module, calibration[:2])
        (folder / "float32.pte").write_bytes(lower(floating))
        integer = export_module(quantized(floating, calibration), calibration[:2])
        (folder / "int8.pte").write_bytes(lower(integer))
    with torch.no_grad():
        accuracies = {"module": accuracy(module, images, labels)}
        for name in ("float32", "int8"):
            accuracies[name] = accuracy(opened(folder / f"{name}.pte"), images, labels)
        accuracies["report"] = accuracy(opened(folder / "int8.pte"), *load_data("report"))
    (folder / "accuracies.json").write_text(json.dumps(accuracies))


def load_module() -> torch.nn.Module:
    """The example's network with its weights."""
    spec = importlib.util.spec_from_file_location("bare_digits", PROJECT / "model.py")
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = source
    spec.loader.exec_module(source)
    module: torch.nn.Module = source.build()
    module.load_state_dict(load_file(PROJECT / "digits.safetensors"))
    return module.eval()


def load_data(part: str) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 8, 8) with grey values 0..1 and labels (n,)."""
    with np.load(PROJECT / f"{part}.npz") as arrays:
        return torch.from_numpy(arrays["image"].astype(np.float32) * SCALE), torch.from_numpy(arrays["label"])


def export_module(module: torch.nn.Module, example: Tensor) -> ExportedProgram:
    """The module for batches of 1 to 64."""
    return export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=BATCH)},))


def quantized(program: ExportedProgram, calibration: Tensor) -> torch.nn.Module:
    """Static int8 by PT2E, weights by channel."""
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    with torch.no_grad():
        prepared: Any = prepare_pt2e(program.module(), quantizer)
        for batch in torch.split(calibration, CALIBRATION_BATCH):
            prepared(batch)
        converted: torch.nn.Module = convert_pt2e(prepared)
    return converted


def lower(program: ExportedProgram) -> bytes:
    """The program for XNNPACK."""
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer)


def opened(file: Path) -> Predict:
    """A program in its runtime, as a function."""
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    return lambda batch: method.execute((batch,))[0].clone()


def accuracy(predict: Predict, images: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    answers = torch.cat([predict(batch).argmax(dim=1) for batch in torch.split(images, BATCH)])
    return float((answers == labels).double().mean())


if __name__ == "__main__":
    # CPython 3.11 maps and unmaps memory at each call that crosses the end of a piece of its frame stack. On
    # the main thread torch's lowering sits there and loses 3 s of system time; on a thread it does not.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(main, Path(sys.argv[1])).result()
