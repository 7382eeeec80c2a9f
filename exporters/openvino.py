"""OpenVINO on the CPU: float32, bfloat16 and int8, from ONNX; int8 by NNCF or as ONNX Runtime's QDQ model.

The inference precision is written into the model, because OpenVINO otherwise takes bfloat16 for float32
where the CPU has it (https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html).
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.spec import TensorSpec
from exporters.arrays import Arrays, checked, refusal
from exporters.base import CONTROLLED, Artifact, Delegated, Operator, Quantization
from exporters.onnx import OnnxModel
from exporters.quiet import quiet
from targets.errors import DeployError, IntegrityError, ModelError

HINT = ["edge_deploy", "inference_precision"]
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "any"}
"""What is not integer in an int8 model runs as OpenVINO likes on this CPU: in bfloat16 where it has that."""
ANY = "any"
WEIGHTS = ".bin"
PLACES = re.compile(r"Exception from |Check '.*' failed|FrontEnd API failed|Model wasn't fully|Summary:|\[ ")
LONGEST = 200
KERNEL = ("layerType", "runtimePrecision", "originalLayersNames", "primitiveType")
PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "LSTMSequence")
INTEGERS = ("u8", "i8")


class OpenVinoExporter:
    """Writes and runs .xml files with their .bin beside them."""

    runtime = "openvino"
    suffix = ".xml"
    precisions = ("float32", "bfloat16", "int8")

    def export(
        self,
        source: OnnxModel,
        *,
        precision: str,
        calibration: Sequence[Arrays],
        quantization: Quantization,
        file: Path,
    ) -> Artifact:
        """Writes the model in a precision. Raises ModelError where OpenVINO or NNCF cannot."""
        ov = _openvino()
        try:
            with quiet():
                model = self._model(ov, source, precision, calibration, quantization)
                model.set_rt_info(HINTS[precision], HINT)
                _name_by_place_(model)
                ov.save_model(model, str(file), compress_to_fp16=False)
        except DeployError:
            raise
        except Exception as error:
            raise ModelError(
                f"OpenVINO cannot hold the model in {precision}",
                found=reason(error),
                fix="exclude the layer with [quantize] exclude, or choose another --runtime",
            ) from error
        return Artifact(
            runtime=self.runtime,
            file=file,
            precision=precision,
            delegated=integer_kernels(ov, model, source) if precision == "int8" else None,
            companions=(file.with_suffix(WEIGHTS),),
        )

    def _model(
        self,
        ov: Any,
        source: OnnxModel,
        precision: str,
        calibration: Sequence[Arrays],
        quantization: Quantization,
    ) -> Any:
        core = ov.Core()
        if precision != "int8":
            return core.read_model(str(source.file))
        if quantization.variant == "qdq":
            from exporters.onnxruntime import quantize_static

            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "qdq.onnx"
                quantize_static(source, calibration, quantization, file)
                return core.read_model(str(file))
        return quantize(core.read_model(str(source.file)), source, calibration, quantization)

    def tapped(self, artifact: Path, names: Sequence[str], file: Path) -> dict[str, str]:
        """Writes a copy of an artifact that answers values inside it too; returns their names there."""
        ov = _openvino()
        model = ov.Core().read_model(str(artifact))
        answered = {name for output in model.outputs for name in output.get_names()}
        made = {
            name for node in model.get_ordered_ops() for port in node.outputs() for name in port.get_names()
        }
        found = [name for name in names if name in made - answered]
        if found:
            model.add_outputs(found)
        ov.save_model(model, str(file), compress_to_fp16=False)
        return {name: name for name in found}

    def load_runtime(self) -> None:
        """Imports the runtime."""
        _openvino()

    def open(
        self,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        spinning: bool = True,
    ) -> "OpenVinoSession":
        """Loads a model for calls."""
        return OpenVinoSession(file, inputs=inputs, outputs=outputs, threads=threads)


def quantize(model: Any, source: OnnxModel, calibration: Sequence[Arrays], quantization: Quantization) -> Any:
    """Static int8 by NNCF, with the presets that it documents for convolutional and transformer models."""
    import nncf

    kept = {f"{node}{ending}" for node in source.nodes_in(quantization.keep_float) for ending in ENDINGS}
    present = {node.get_friendly_name() for node in model.get_ordered_ops()}
    names = [spec.name for spec in source.inputs]
    batches = [{name: batch[name] for name in names} for batch in calibration]
    settings = {
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": nncf.ModelType.TRANSFORMER if quantization.transformer else None,
        "ignored_scope": nncf.IgnoredScope(names=sorted(kept & present)),
    }

    def plain(items: Sequence[Arrays]) -> Any:
        return nncf.quantize(model, nncf.Dataset(items), subset_size=len(items), **settings)

    with contextlib.redirect_stdout(io.StringIO()):  # it draws progress bars
        if quantization.variant != CONTROLLED:
            return plain(batches)
        from exporters.accuracy_control import quantize_controlled

        return quantize_controlled(
            model, batches, least_snr_db=quantization.least_snr_db, plain=plain, settings=settings
        )


ENDINGS = ("", "/WithoutBiases")
"""What OpenVINO appends to the name of an ONNX node whose bias becomes an addition of its own."""


def integer_kernels(ov: Any, model: Any, source: OnnxModel) -> Delegated:
    """Which products OpenVINO runs on integers on this CPU, by what it says of the compiled model."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    integer, left = 0, []
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {name: node.get_rt_info()[name].astype(str) for name in KERNEL if name in node.get_rt_info()}
        if told.get("layerType") not in PRODUCTS:
            continue
        if told.get("runtimePrecision") in INTEGERS:
            integer += 1
            continue
        names = told.get("originalLayersNames", "").split(",")
        paths = (source.modules.get(name.removesuffix(ENDINGS[1]), "") for name in names)
        why = f"OpenVINO chose {told.get('primitiveType', 'a float kernel')} for it"
        left.append(Operator(operator=told["layerType"], module=next(filter(None, paths), ""), why=why))
    return Delegated(
        delegate="int8 kernels", operators=integer + len(left), delegated=integer, left=tuple(left)
    )


def reason(error: BaseException) -> str:
    """What OpenVINO says is wrong: missing operators, else the first line that is no place in its source."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    telling = [line for line in lines if not PLACES.match(line)]
    missing = [line for line in telling if "operations" in line]
    return next(iter([*missing, *telling, *lines]), type(error).__name__)[:LONGEST]


def _name_by_place_(model: Any) -> None:
    """Numbers the nodes without a name of their own by their place, not by how many the process has made."""
    for place, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        name = re.sub(rf"{kind}_\d+", f"{kind}_{place}", node.get_friendly_name())
        if name != node.get_friendly_name():
            node.set_friendly_name(name)


def _openvino() -> Any:
    """OpenVINO, and NNCF later, without their telemetry: both do without the package where it is absent."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("NNCF_CI", "1")
    with quiet():
        import openvino
    return openvino


class OpenVinoSession:
    """A loaded .xml."""

    def __init__(
        self, file: Path, *, inputs: Sequence[TensorSpec], outputs: Sequence[str], threads: int
    ) -> None:
        self._ov = _openvino()
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._file = file
        self._smallest = {spec.name: _smallest(spec) for spec in self._inputs}
        self._varies = any(low != high for spec in self._inputs for low, high in spec.bounds.values())
        try:
            self._model = self._ov.Core().read_model(str(file))
            self.set_threads(threads)
        except RuntimeError as error:
            raise IntegrityError(
                f"{file.name} is no model that this OpenVINO loads", found=reason(error)
            ) from error

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """One call; the outputs are copies."""
        try:
            self.call(self.prepare(inputs))
        except RuntimeError as error:
            shapes = {name: array.shape for name, array in inputs.items()}
            raise refusal("model", shapes, self._inputs, reason(error)) from error
        return {name: np.array(self._last.get_tensor(name).data) for name in self._outputs}

    def prepare(self, inputs: Arrays) -> list[tuple[str, Any]]:
        """Tensors that share the arrays' memory. Raises ModelError for a wrong name or dtype."""
        arrays = [(spec.name, checked(spec, inputs)) for spec in self._inputs]
        return [(name, self._ov.Tensor(array, shared_memory=True)) for name, array in arrays]

    def call(self, prepared: list[tuple[str, Any]]) -> None:
        """One call whose outputs stay in the request."""
        request = self._request_for(prepared)
        for name, tensor in prepared:
            request.set_tensor(name, tensor)
        request.start_async()
        request.wait()
        self._last = request

    def set_threads(self, threads: int) -> None:
        """Compiles the model anew for so many threads."""
        self._threads = threads
        self._general = self._last = self._compiled(self._model)
        self._single: Any = None

    def _request_for(self, prepared: list[tuple[str, Any]]) -> Any:
        """A request of the model compiled for the smallest inputs alone, or of the general one for others.

        OpenVINO plans ahead for sizes that it knows: single samples run faster by it.
        """
        if not self._varies or any(tuple(t.shape) != self._smallest[name] for name, t in prepared):
            return self._general
        if self._single is None:
            model = self._model.clone()
            model.reshape({name: list(shape) for name, shape in self._smallest.items()})
            self._single = self._compiled(model)
        return self._single

    def _compiled(self, model: Any) -> Any:
        precision = model.get_rt_info(HINT).astype(str) if model.has_rt_info(HINT) else "f32"
        settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if precision != ANY:
            settings["INFERENCE_PRECISION_HINT"] = precision
        return self._ov.Core().compile_model(model, "CPU", settings).create_infer_request()


def _smallest(spec: TensorSpec) -> tuple[int, ...]:
    return spec.sizes(**{name: low for name, (low, _) in spec.bounds.items()})
