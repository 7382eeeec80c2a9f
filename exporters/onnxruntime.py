"""ONNX Runtime on the CPU: float32, static int8 (QDQ, per channel) and dynamic int8.

Follows ONNX Runtime's own guide for CPU inference: unsigned activations and signed weights on x86, with
7-bit weights where products saturate (no VNNI), signed ones on Arm
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from calibration.spec import TensorSpec
from exporters import external_data
from exporters.arrays import Arrays, checked, refusal
from exporters.base import Artifact, Delegated, Operator, Quantization
from exporters.onnx import OnnxModel, add_outputs_, drop_unused_
from exporters.quiet import quiet
from targets.errors import DeployError, IntegrityError, ModelError, first_line

DYNAMIC_OPERATORS = ["MatMul", "Gemm", "Gather", "LSTM", "Attention"]
"""What dynamic int8 quantizes: convolutions have no fast kernel for it."""
FLOAT_OPERATORS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "LSTM", "GRU",
    "Attention",
)  # fmt: skip
INTEGER_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "MatMulNBits",
)  # fmt: skip
BLOCK, INT8_ACTIVATIONS = 32, 4
"""Of 4-bit weights: weights that share a scale, and the contrib operator's level that computes in int8."""
DEQUANTIZED = "_DequantizeLinear_Output"
"""What the quantizer appends to the name of a value for the one that stands in for it."""
CALIBRATORS = {"min-max": "MinMax", "percentile": "Percentile", "mse": "Entropy"}
"""By deploy.toml's observers; the nearest to the mean square that ONNX Runtime has is the KL divergence."""


class OnnxRuntimeExporter:
    """Writes and runs .onnx files."""

    runtime = "onnxruntime"
    suffix = ".onnx"
    precisions = ("float32", "int8", "int8-dynamic", "int4")

    def export(
        self,
        source: OnnxModel,
        *,
        precision: str,
        calibration: Sequence[Arrays],
        quantization: Quantization,
        file: Path,
    ) -> Artifact:
        """Writes the model in a precision. Raises ModelError where it cannot be quantized."""
        if precision == "float32":
            companions = _copied(source, file)
        elif precision == "int4":
            companions = quantize_weights(source, quantization, file)
        elif precision == "int8-dynamic":
            companions = quantize_dynamic(source, quantization, file)
        else:
            companions = quantize_static(source, calibration, quantization, file)
        kernels = None if precision == "float32" else integer_kernels(file, source)
        return Artifact(
            runtime=self.runtime, file=file, precision=precision, delegated=kernels, companions=companions
        )

    def tapped(self, artifact: Path, names: Sequence[str], file: Path) -> dict[str, str]:
        """Writes a copy of an artifact that answers values inside it too; returns their names there.

        Of a quantized value it is what the operators behind it read: a ReLU may be done by quantizing alone.
        """
        import onnx

        model = onnx.load(str(artifact), load_external_data=False)
        made = {name for node in model.graph.node for name in node.output}
        read = {name: f"{name}{DEQUANTIZED}" for name in names}
        wanted = {name: read[name] if read[name] in made else name for name in names}
        found = {*add_outputs_(model, list(wanted.values()))}
        external_data.save(model, file, folder=artifact.parent)
        return {name: there for name, there in wanted.items() if there in found}

    def load_runtime(self) -> None:
        """Imports the runtime."""
        import onnxruntime  # noqa: F401

    def open(
        self,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        spinning: bool = True,
    ) -> "OnnxRuntimeSession":
        """Loads a model for calls."""
        return OnnxRuntimeSession(file, inputs=inputs, outputs=outputs, threads=threads, spinning=spinning)


def _copied(source: OnnxModel, file: Path) -> tuple[Path, ...]:
    """The model as it is; its weights keep the name by which it asks for them."""
    shutil.copyfile(source.file, file)
    return tuple(Path(shutil.copyfile(each, file.with_name(each.name))) for each in source.companions)


def quantize_static(
    source: OnnxModel, calibration: Sequence[Arrays], quantization: Quantization, file: Path
) -> tuple[Path, ...]:
    """Writes QuantizeLinear and DequantizeLinear pairs with per-channel weights into a copy of the model."""
    with quiet():
        from onnxruntime import quantization as ort

    activations = ort.QuantType.QInt8 if quantization.signed_activations else ort.QuantType.QUInt8
    with _translated(f"int8 ({quantization.observer})"):
        ort.quantize_static(
            source.file,
            file,
            _reader(source, calibration),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=quantization.reduce_range,
            activation_type=activations,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=source.nodes_in(quantization.keep_float),
            use_external_data_format=bool(source.companions),
            calibrate_method=ort.CalibrationMethod[CALIBRATORS[quantization.observer]],
        )
        return _gathered(source, file)


def quantize_operators(
    plain: Path,
    source: OnnxModel,
    calibration: Sequence[Arrays],
    quantization: Quantization,
    excluded: Sequence[str],
    file: Path,
) -> None:
    """Writes convolutions as per-tensor QLinearConv into a copy of `plain`, the source rewritten."""
    with quiet():
        from onnxruntime import quantization as ort

    with _translated(f"int8 ({quantization.observer})"):
        ort.quantize_static(
            plain,
            file,
            _reader(source, calibration),
            quant_format=ort.QuantFormat.QOperator,
            per_channel=False,
            reduce_range=quantization.reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=list(excluded),
            calibrate_method=ort.CalibrationMethod[CALIBRATORS[quantization.observer]],
        )


def _reader(source: OnnxModel, calibration: Sequence[Arrays]) -> Any:
    """The calibration batches as ONNX Runtime's quantizer asks for them."""
    with quiet():
        from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> Mapping[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {spec.name: batch[spec.name] for spec in source.inputs}

    return Reader()


def quantize_dynamic(source: OnnxModel, quantization: Quantization, file: Path) -> tuple[Path, ...]:
    """Writes int8 weights whose activations are quantized by the range of each call."""
    with quiet():
        from onnxruntime import quantization as ort

    with _translated("int8-dynamic"):
        ort.quantize_dynamic(
            source.file,
            file,
            op_types_to_quantize=DYNAMIC_OPERATORS,
            per_channel=True,
            reduce_range=quantization.reduce_range,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=source.nodes_in(quantization.keep_float),
            use_external_data_format=bool(source.companions),
        )
        return _gathered(source, file)


def _gathered(source: OnnxModel, file: Path) -> tuple[Path, ...]:
    """What the quantizer wrote beside a large model, in the model itself where it fits there now."""
    if not source.companions:
        return ()
    import onnx

    written = file.with_name(f"{file.name}.data")
    companions = external_data.save(onnx.load(file, load_external_data=False), file, folder=file.parent)
    written.unlink(missing_ok=True)
    return companions


def quantize_weights(source: OnnxModel, quantization: Quantization, file: Path) -> tuple[Path, ...]:
    """Writes weights of matrix products in 4 bits, in blocks of 32 along the input dimension.

    Raises ModelError where the model has no matrix product with constant weights.
    """
    import onnx

    with quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    model = onnx.load(str(source.file))
    _gemm_as_matmul_(model.graph)
    with _translated("int4"):
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
        )
        quantizer = nbits.MatMulNBitsQuantizer(
            model, nodes_to_exclude=source.nodes_in(quantization.keep_float), algo_config=config
        )
        quantizer.process()
        written = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in written.graph.node):
        raise ModelError(
            "nothing can be held in int4",
            found="no matrix product with constant weights",
            expected="linear layers; convolutions have no 4-bit kernel",
            fix="use --precision int8",
        )
    return external_data.save(written, file)


def _gemm_as_matmul_(graph: Any) -> None:
    """Writes linear layers as a product and an addition, which is the form that has 4-bit kernels."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        matrix = numpy_helper.to_array(weights[node.input[1]])
        turned = np.ascontiguousarray(matrix.T if settings.get("transB") else matrix)
        name, product = f"{node.name}_matrix", f"{node.name}_product"
        graph.initializer.append(numpy_helper.from_array(turned, name))
        biased = len(node.input) > 2
        result = product if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [result], name=node.name))
        if biased:
            nodes.append(
                helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}_bias")
            )
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_(graph)


def integer_kernels(file: Path, source: OnnxModel) -> Delegated:
    """Which products of a quantized model run on integers, as ONNX Runtime's own optimiser leaves them.

    A product whose neighbours were not quantized keeps its float kernel, and converting for it costs time.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        with _translated("int8"):
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    integer = sum(node.op_type in INTEGER_OPERATORS for node in graph.node)
    left = tuple(
        Operator(
            operator=node.op_type,
            module=source.modules.get(node.name.partition("_quant")[0], ""),
            why="its inputs stay float in the quantized graph",
        )
        for node in graph.node
        if node.op_type in FLOAT_OPERATORS
    )
    return Delegated(delegate="int8 kernels", operators=integer + len(left), delegated=integer, left=left)


@contextmanager
def _translated(precision: str) -> Iterator[None]:
    """Turns whatever the quantizer raises into a ModelError."""
    try:
        with quiet():
            yield
    except DeployError:
        raise
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime cannot quantize the model to {precision}",
            found=first_line(error),
            fix="exclude the layer with [quantize] exclude, or use --precision float32",
        ) from error


def unoptimised_session(model: Any, folder: Path) -> Any:
    """A model as ONNX Runtime computes it node by node; its external data lie in `folder`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry(external_data.FOLDER_SETTING, str(folder))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class OnnxRuntimeSession:
    """A loaded .onnx."""

    def __init__(
        self,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        spinning: bool,
    ) -> None:
        self._file = file
        self._spinning = spinning
        self._inputs = tuple(inputs)
        self._outputs = list(outputs)
        self.set_threads(threads)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """One call."""
        try:
            values = self._session.run(self._outputs, self.prepare(inputs))
        except DeployError:
            raise
        except Exception as error:  # the runtime's own exceptions share no base
            shapes = {name: array.shape for name, array in inputs.items()}
            raise refusal("model", shapes, self._inputs, first_line(error)) from error
        return dict(zip(self._outputs, values, strict=True))

    def prepare(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Contiguous arrays by name. Raises ModelError for a wrong name or dtype."""
        return {spec.name: checked(spec, inputs) for spec in self._inputs}

    def call(self, prepared: dict[str, np.ndarray[Any, Any]]) -> None:
        """One call whose outputs are thrown away."""
        self._session.run(self._outputs, prepared)

    def set_threads(self, threads: int) -> None:
        """Opens the model anew: a session's threads are fixed when it is made."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self._spinning)))
        try:
            self._session = onnxruntime.InferenceSession(
                str(self._file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own exceptions share no base
            raise IntegrityError(
                f"{self._file.name} is no model that this ONNX Runtime loads", found=first_line(error)
            ) from error
