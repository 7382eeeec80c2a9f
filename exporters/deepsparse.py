"""DeepSparse 1.8.0 on x86 CPUs, whose kernels skip zeros: float32, and int8 in ONNX's quantized operators.

The product ended in June 2025 and its community licence is for evaluation, not for production. The engine
wants packages of its own, so sessions run in an isolated environment; a graph that it does not take as it is
runs at dense speed or worse without a word, so the graph is rewritten and the engine is asked how much of it
its kernels take.
"""

import importlib.util
import json
import math
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.spec import TensorSpec
from exporters.arrays import Arrays, checked, refusal
from exporters.base import Artifact, Delegated, Operator, Quantization
from exporters.onnx import OnnxModel, drop_unused_
from targets.errors import IntegrityError, MissingRequirementError, ModelError, first_line

IR_VERSION = 8
WEIGHTED = {"Conv": 1, "Gemm": 1, "MatMul": 1, "QLinearConv": 3, "ConvInteger": 1}
"""Operators with weights, and which of their inputs holds them."""
ENGINES = 3
"""Batches that a session keeps an engine for: each is compiled for one."""
SCHEDULER = "single_stream"


class DeepSparseExporter:
    """Writes .onnx files that the engine takes whole, and runs them."""

    runtime = "deepsparse"
    suffix = ".onnx"
    precisions = ("float32", "int8")

    def export(
        self,
        source: OnnxModel,
        *,
        precision: str,
        calibration: Sequence[Arrays],
        quantization: Quantization,
        file: Path,
    ) -> Artifact:
        """Writes the model in a precision.

        Raises ModelError where dimensions beside the batch vary, where nothing can be quantized, and where
        the engine's kernels take no part of the graph.
        """
        import onnx

        _check_dimensions(source.inputs)
        if source.companions:
            raise ModelError(
                "deepsparse reads one file",
                found="weights over 2 GB beside the model",
                expected="a model that protobuf holds",
                fix="leave deepsparse out",
            )
        model = onnx.load(str(source.file))
        accept_(model)
        if precision == "int8":
            plain = file.with_name("float.onnx")
            onnx.save(model, str(plain))
            quantize(model.graph, plain, source, calibration, quantization, file)
            plain.unlink()
        else:
            file.write_bytes(model.SerializeToString(deterministic=True))
        return Artifact(
            runtime=self.runtime, file=file, precision=precision, delegated=_delegated(file, source.inputs)
        )

    def load_runtime(self) -> None:
        """Loads the engine's library."""
        _library()

    def open(
        self,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        spinning: bool = True,
    ) -> "DeepSparseSession":
        """Loads a model for calls, in the environment that has the engine."""
        return DeepSparseSession(file, inputs=inputs, outputs=outputs, threads=threads)


def _check_dimensions(inputs: Sequence[TensorSpec]) -> None:
    firsts = {spec.ranges[0] if spec.shape else None for spec in inputs}
    if len(firsts) != 1 or None in firsts:
        raise ModelError(
            "deepsparse compiles a graph for one batch",
            found=", ".join(f"{spec.name} {list(spec.shape)}" for spec in inputs),
            expected="inputs that share their first dimension",
            fix="leave deepsparse out",
        )
    for spec in inputs:
        varying = [size for size in spec.shape[1:] if isinstance(size, str)]
        if varying:
            raise ModelError(
                f"deepsparse compiles {spec.name} for one size",
                found=f"the dynamic dimension {varying[0]}",
                expected="no dynamic dimension but the first",
                fix="give the dimension a number in [inputs], or leave deepsparse out",
            )


def accept_(model: Any) -> None:
    """Rewrites a graph in place into the forms that the engine's optimiser knows; the answers stay.

    A mean over all of a picture is written as GlobalAveragePool, since a ReduceMean with its axes as an
    input keeps the whole graph from the fast path. Reshape to (batch, everything) is written as Flatten,
    which keeps the batch free.
    """
    from onnx import helper, numpy_helper

    graph, shapes = model.graph, _shapes(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        shape = shapes.get(node.input[0] if node.input else "", [])
        if node.op_type == "ReduceMean" and _over_picture(node, settings, constants, len(shape)):
            pooled = node.output[0] if settings.get("keepdims", 1) else f"{node.output[0]}_pooled"
            nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
            if pooled != node.output[0]:
                nodes.append(_flatten(f"{node.name}_flat", pooled, node.output[0]))
        elif node.op_type == "Reshape" and _flattens(constants.get(node.input[1]), shape):
            nodes.append(_flatten(node.name, node.input[0], node.output[0]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_(graph)
    model.ir_version = IR_VERSION


def _shapes(model: Any) -> dict[str, list[int]]:
    """The sizes of values as far as they are known, 0 for a size that varies."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _flatten(name: str, value: str, output: str) -> Any:
    from onnx import helper

    return helper.make_node("Flatten", [value], [output], name=name, axis=1)


def _over_picture(node: Any, settings: Mapping[str, Any], constants: Mapping[str, Any], rank: int) -> bool:
    """Whether a mean goes over all dimensions but the batch and the channels."""
    axes = settings.get("axes")
    if axes is None and len(node.input) > 1 and node.input[1] in constants:
        axes = constants[node.input[1]].tolist()
    return axes is not None and rank > 2 and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _flattens(wanted: np.ndarray[Any, Any] | None, shape: Sequence[int]) -> bool:
    """Whether a Reshape joins all dimensions but the first, which it leaves."""
    if wanted is None or wanted.shape != (2,) or len(shape) < 2 or not all(shape[1:]):
        return False
    first, rest = wanted.tolist()
    joined = math.prod(shape[1:])
    return (first, rest) in ((0, -1), (0, joined), (-1, joined), (shape[0] or None, joined))


def quantize(
    graph: Any,
    plain: Path,
    source: OnnxModel,
    calibration: Sequence[Arrays],
    quantization: Quantization,
    file: Path,
) -> None:
    """Writes per-tensor QLinearConv, the one static form that the engine's kernels take: it refuses QDQ.

    `plain` holds the rewritten float graph.

    Weights are signed and symmetric, so that zeros stay zeros. A convolution of nothing but zeros stays
    float: it has no scale. Raises ModelError for a model without convolutions.
    """
    import onnx

    from exporters.onnxruntime import quantize_operators

    weights = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in weights]
    empty = [
        node.name for node in convolutions if not onnx.numpy_helper.to_array(weights[node.input[1]]).any()
    ]
    if len(empty) == len(convolutions):
        raise ModelError(
            "deepsparse has nothing to quantize",
            found="no convolution",
            expected="a convolution: matrix products stay float here",
            fix="use --precision float32 for this runtime",
        )
    excluded = [*empty, *source.nodes_in(quantization.keep_float)]
    quantize_operators(plain, source, calibration, quantization, excluded, file)


def dense_twin(file: Path, twin: Path, *, seed: int = 0) -> None:
    """Writes the same graph with the zeros of its weights filled: what they are timed against.

    Float weights take normal numbers of the spread of those that stayed, integers any but zero.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(file))
    random = np.random.default_rng(seed)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        node.input[WEIGHTED[node.op_type]]
        for node in model.graph.node
        if node.op_type in WEIGHTED and len(node.input) > WEIGHTED[node.op_type]
    }
    for name in sorted(names & tensors.keys()):
        value = numpy_helper.to_array(tensors[name])
        tensors[name].CopyFrom(numpy_helper.from_array(_filled(value, random), name))
    twin.write_bytes(model.SerializeToString(deterministic=True))


def _filled(value: np.ndarray[Any, Any], random: np.random.Generator) -> np.ndarray[Any, Any]:
    if value.dtype.kind == "f":
        spread = float(value[value != 0].std()) if value.any() else 1.0
        drawn = random.normal(0, spread or 1.0, value.shape)
    else:
        drawn = random.integers(1, 127, value.shape) * random.choice([-1, 1], value.shape)
    return np.where(value == 0, drawn, value).astype(value.dtype)


def _delegated(file: Path, inputs: Sequence[TensorSpec]) -> Delegated:
    """How much of the graph the engine's kernels take. Raises ModelError for nothing of it."""
    import onnx

    from exporters.remote import RemoteSession

    graph = onnx.load(str(file)).graph
    outputs = [value.name for value in graph.output]
    try:
        with RemoteSession("deepsparse", file, inputs=inputs, outputs=outputs, threads=1) as session:
            fraction = session.supported_fraction()
    except IntegrityError as error:
        raise ModelError("deepsparse does not compile the graph", found=error.message.rstrip(".")) from error
    if fraction == 0:
        raise ModelError(
            "deepsparse takes no part of the graph",
            found="fraction_of_supported_ops 0.0: it would run at dense speed or worse",
            expected="convolutions and matrix products in a form that its kernels know",
            fix="leave deepsparse out",
        )
    operators = len(graph.node)
    taken = round(fraction * operators)
    rest = Operator(
        operator=f"{operators - taken} of {operators} operators",
        module="",
        why=f"fraction_of_supported_ops is {fraction:.2f}; the engine does not say which are left out",
    )
    left = (rest,) if taken < operators else ()
    return Delegated(delegate="deepsparse", operators=operators, delegated=taken, left=left)


class DeepSparseSession:
    """A model behind one engine for each batch that it is called with."""

    def __init__(
        self, file: Path, *, inputs: Sequence[TensorSpec], outputs: Sequence[str], threads: int
    ) -> None:
        self._file = file
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = list(outputs)
        self.set_threads(threads)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """One call."""
        engine, arrays = self.prepare(inputs)
        try:
            values = engine.execute_list_out(arrays)
        except Exception as error:  # the engine's own exceptions share no base
            shapes = {name: array.shape for name, array in inputs.items()}
            raise refusal("model", shapes, tuple(self._inputs.values()), first_line(error)) from error
        by_name = dict(zip(engine.output_names(), values, strict=True))
        return {name: np.array(by_name[name]) for name in self._outputs}

    def prepare(self, inputs: Arrays) -> tuple[Any, list[np.ndarray[Any, Any]]]:
        """The engine for the inputs' batch, and contiguous arrays in its order."""
        given = {name: _plain(checked(spec, inputs)) for name, spec in self._inputs.items()}
        engine = self._engine(next(iter(given.values())).shape[0])
        return engine, [given[name] for name in engine.input_names()]

    def call(self, prepared: tuple[Any, list[np.ndarray[Any, Any]]]) -> None:
        """One call whose outputs are thrown away."""
        engine, arrays = prepared
        engine.execute_list_out(arrays)

    def set_threads(self, threads: int) -> None:
        """Compiles anew: an engine's cores are fixed when it is made."""
        self._threads = threads
        self._engines: OrderedDict[int, Any] = OrderedDict()
        self._engine(self._smallest())

    def supported_fraction(self) -> float:
        """The share of the graph that the engine's own kernels take; the rest runs as in ONNX Runtime."""
        return float(self._engine(self._smallest()).fraction_of_supported_ops())

    def _smallest(self) -> int:
        first = next(iter(self._inputs.values()))
        return first.ranges[0][0]

    def _engine(self, batch: int) -> Any:
        if batch not in self._engines:
            try:
                self._engines[batch] = _library().deepsparse_engine(
                    str(self._file), batch, self._threads, 0, SCHEDULER, None, None
                )
            except Exception as error:  # the engine's own exceptions share no base
                raise IntegrityError(
                    f"{self._file.name} is no model that DeepSparse compiles", found=first_line(error)
                ) from error
        self._engines.move_to_end(batch)
        while len(self._engines) > ENGINES:
            self._engines.popitem(last=False)
        return self._engines[batch]


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory under numpy's own dtype object: the engine knows no equal one, as unpickling makes."""
    return array.view(np.dtype(array.dtype.name))


def _library() -> Any:
    """The engine's extension module, without the package around it, which would report its use."""
    loaded = sys.modules.get("deepsparse_engine")
    if loaded is not None:
        return loaded
    package = importlib.util.find_spec("deepsparse")
    if package is None or not package.submodule_search_locations:
        raise MissingRequirementError(
            "deepsparse cannot run in this process",
            found="no package deepsparse",
            expected="the environment made for it",
            fix="open the artifact in a process of its own",
        )
    folder = Path(next(iter(package.submodule_search_locations)))
    machine = json.loads(subprocess.check_output([folder / "arch.bin"]))
    file = folder / machine["isa"] / "deepsparse_engine.so"
    if not file.exists():
        raise MissingRequirementError(
            "deepsparse has no engine for this CPU", found=machine["isa"], expected="AVX2 or AVX-512"
        )
    spec = importlib.util.spec_from_file_location("deepsparse_engine", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["deepsparse_engine"] = module
    return module
