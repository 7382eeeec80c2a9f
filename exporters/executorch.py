"""ExecuTorch programs (.pte) for the XNNPACK delegate: float32, float16, static and dynamic int8.

Follows ExecuTorch 1.4's documented path: PT2E quantization with XNNPACKQuantizer, then
to_edge_transform_and_lower with the XNNPACK partitioners.
"""

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.utils import _pytree as pytree

from calibration.spec import TensorSpec
from exporters.arrays import checked, refusal
from exporters.base import Artifact, Delegated, Operator, Quantization
from exporters.capture import plain_convolutions
from exporters.quiet import quiet
from exporters.rewrites import copied, prefer_delegated_forms
from targets.errors import DeployError, IntegrityError, ModelError, UsageError, first_line

REFUSED_OPERATORS = {
    "while_loop": "ExecuTorch 1.4 does not emit while_loop; unroll it, or use scan with a fixed length"
}
FRAGILE_MEANS = ("int8", "float16")
"""Precisions whose delegated mean breaks when the batch grows: see rewrites.keep_means_outside_."""


class ExecuTorchExporter:
    """Writes and runs .pte files."""

    runtime = "executorch"
    suffix = ".pte"
    precisions = ("float32", "float16", "int8", "int8-dynamic")

    def export(
        self,
        source: Any,
        *,
        precision: str,
        calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]],
        quantization: Quantization,
        file: Path,
    ) -> Artifact:
        """Lowers the graph to XNNPACK and writes the program. Raises ModelError where it cannot."""
        graph = self.quantized(
            source,
            self.rewritten(source, precision),
            precision,
            calibration=calibration,
            quantization=quantization,
        )
        delegated = self.write(source.program(graph), precision, file)
        return Artifact(runtime=self.runtime, file=file, precision=precision, delegated=delegated)

    def rewritten(self, captured: Any, precision: str) -> torch.fx.GraphModule:
        """The float graph as it will be quantized to a precision and lowered."""
        _refuse_operators(captured.graph)
        dynamic = _dynamic_dimensions(captured.inputs)
        safe_means = precision in FRAGILE_MEANS and bool(dynamic)
        graph = prefer_delegated_forms(captured.graph, safe_means=safe_means)
        _refuse_dynamic_loops(graph, dynamic)
        return graph

    def quantized(
        self,
        captured: Any,
        graph: torch.fx.GraphModule,
        precision: str,
        *,
        calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]],
        quantization: Quantization,
    ) -> torch.fx.GraphModule:
        """The rewritten graph in the wanted precision."""
        return quantize(captured, graph, precision, calibration, quantization)

    def write(self, program: torch.export.ExportedProgram, precision: str, file: Path) -> Delegated:
        """Lowers a program in its final precision into a file."""
        data, delegated = lower(program, dynamic=precision == "int8-dynamic")
        file.write_bytes(data)
        return delegated

    def load_runtime(self) -> None:
        """Imports the runtime's bindings."""
        _runtime()

    def open(
        self,
        file: Path,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        threads: int,
        spinning: bool = True,
    ) -> "ExecuTorchSession":
        """Loads a program for calls; only the runtime is imported."""
        return ExecuTorchSession(file, inputs=inputs, outputs=outputs, threads=threads)


def quantize(
    captured: Any,
    graph: torch.fx.GraphModule,
    precision: str,
    calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    quantization: Quantization,
) -> torch.fx.GraphModule:
    """The graph in the wanted precision; its inputs and outputs stay float32."""
    if precision == "float32":
        return graph
    if precision == "float16":
        return _half(graph)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    try:
        with quiet(), torch.no_grad():
            prepared = prepare_pt2e(copied(graph), _quantizer(precision, quantization))
            for batch in calibration:
                _calibrate(captured, prepared, batch)
            converted: torch.fx.GraphModule = convert_pt2e(prepared)
    except DeployError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model cannot be quantized to {precision}",
            found=first_line(error),
            fix="exclude the layer with [quantize] exclude, or use --precision float32",
        ) from error
    return converted


def _calibrate(
    captured: Any, prepared: torch.fx.GraphModule, batch: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """One batch through the observers. Raises UsageError when the model itself cannot take it."""
    positional, by_name = _arguments(captured, batch)
    try:
        prepared(*positional, **by_name)
    except (RuntimeError, IndexError, ValueError):
        try:
            captured.graph(*positional, **by_name)
        except (RuntimeError, IndexError, ValueError) as error:
            raise UsageError(
                "the model raised on the calibration data",
                found=first_line(error),
                expected="data that the model takes",
                fix="correct [calibration], or its [inputs] and preprocess",
            ) from error
        raise


def lower(program: torch.export.ExportedProgram, *, dynamic: bool) -> tuple[bytes, Delegated]:
    """The program's bytes and what XNNPACK took of it."""
    with quiet():
        from executorch.backends.xnnpack.partition import xnnpack_partitioner as partitioners
        from executorch.exir import to_edge_transform_and_lower

    chosen = [partitioners.XnnpackPartitioner()]
    if dynamic:
        chosen.insert(0, partitioners.XnnpackDynamicallyQuantizedPartitioner())
    reasons: dict[str, str] = {}
    try:
        with quiet(), plain_convolutions(), _refusals(reasons):
            edge = to_edge_transform_and_lower(program, partitioner=chosen)
            delegated = _delegation(edge.exported_program().graph_module, reasons)
            data = bytes(edge.to_executorch().buffer)
    except DeployError:
        raise
    except Exception as error:
        raise ModelError(
            "ExecuTorch cannot lower the model",
            found=first_line(error),
            fix="exclude the operator it names, or choose another precision with --precision float32",
        ) from error
    return data, delegated


def _half(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Weights and arithmetic in float16 between float32 inputs and outputs."""

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copied(graph).half()

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
            narrow = [_to_half(value) for value in pytree.tree_leaves((args, kwargs))]
            # Node by node, so that the traced operators keep their places in the user's model.
            with fx_traceback.preserve_node_meta():
                flat = torch.fx.Interpreter(self.inner).run(*narrow, enable_io_processing=False)
            return pytree.tree_map(_to_float, self.inner.graph.process_outputs(flat))

    half = Half()
    half.forward = _with_signature(half.forward, graph)  # type: ignore[method-assign]
    return half  # type: ignore[return-value]


def _with_signature(function: Any, graph: torch.fx.GraphModule) -> Any:
    import functools
    import inspect

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = inspect.signature(graph.forward)  # type: ignore[attr-defined]
    return call


def _to_half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _to_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _quantizer(precision: str, quantization: Quantization) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer

    from exporters.observers import with_observer

    config = xnnpack_quantizer.get_symmetric_quantization_config(
        is_per_channel=True, is_dynamic=precision == "int8-dynamic"
    )
    config = with_observer(config, quantization.observer)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
    kept = quantization.keep_float

    def may_quantize(node: torch.fx.Node) -> bool:
        path = module_path(node)
        return not any(path == name or path.startswith(f"{name}.") for name in kept)

    return quantizer.set_filter_function(may_quantize)


def module_path(node: torch.fx.Node) -> str:
    """Where a node stands in the user's model, e.g. "block1.expand.0"; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def _arguments(
    captured: Any, batch: Mapping[str, np.ndarray[Any, Any]]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    tensors = {
        spec.name: torch.from_numpy(np.ascontiguousarray(batch[spec.name])) for spec in captured.inputs
    }
    return ((), tensors) if captured.arguments[1] else (tuple(tensors.values()), {})


def _refuse_operators(graph: torch.fx.GraphModule) -> None:
    for submodule in graph.modules():
        if not isinstance(submodule, torch.fx.GraphModule):
            continue
        for node in submodule.graph.nodes:
            name = getattr(node.target, "__name__", str(node.target))
            if name in REFUSED_OPERATORS:
                raise ModelError(
                    f"the model uses {name}",
                    found=f"in {module_path(node) or 'the model itself'}",
                    expected="operators that ExecuTorch emits",
                    fix=REFUSED_OPERATORS[name],
                )


def _dynamic_dimensions(inputs: Sequence[TensorSpec]) -> list[str]:
    return [name for spec in inputs for name, (low, high) in spec.bounds.items() if low != high]


def _refuse_dynamic_loops(graph: torch.fx.GraphModule, dynamic: Sequence[str]) -> None:
    """A loop that was too long to write out answers other batches wrongly, in silence."""
    loops = [
        node for node in graph.graph.nodes if getattr(node.target, "__name__", "") in ("scan", "map_impl")
    ]
    if dynamic and loops:
        raise ModelError(
            f"a {loops[0].target.__name__} of many steps cannot have dynamic dimensions",
            found=f"in {module_path(loops[0]) or 'the model itself'}, with dynamic {', '.join(dynamic)}",
            expected="fixed sizes: ExecuTorch 1.4 answers other sizes wrongly",
            fix="give the dimension a number in [inputs], or min = max",
        )


def _delegation(graph: torch.fx.GraphModule, reasons: Mapping[str, str]) -> Delegated:
    inside = 0
    left: list[Operator] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.name.startswith("lowered_module_"):
            lowered = getattr(graph, node.name).original_module.graph
            inside += sum(1 for inner in lowered.nodes if _is_operator(inner))
        elif _is_operator(node):
            left.append(_left_out(node, reasons))
    return Delegated(delegate="xnnpack", operators=inside + len(left), delegated=inside, left=tuple(left))


def _is_operator(node: torch.fx.Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and not any(
        skip in name for skip in ("getitem", "call_delegate", "alloc", "sym_size")
    )


def _left_out(node: torch.fx.Node, reasons: Mapping[str, str]) -> Operator:
    operator = str(node.target).removeprefix("<EdgeOpOverload: ").partition(">")[0]
    why = reasons.get(node.name) or "XNNPACK has no such operator, or its neighbours stay outside too"
    return Operator(operator=operator, module=module_path(node), why=why)


@contextmanager
def _refusals(reasons: dict[str, str]) -> Iterator[None]:
    """Collects what the partitioner logs about each node that it leaves out."""
    pattern = re.compile(r"WhyNoPartition: Node (\S+) was not partitioned because (.+?)\.?$", re.DOTALL)

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := pattern.match(str(record.msg)):
                reasons.setdefault(match[1], match[2])

    names = ("generic_node_configs", "gemm_configs", "xnnpack_config", "node_configs")
    loggers = [logging.getLogger(f"executorch.backends.xnnpack.partition.config.{name}") for name in names]
    handler, levels = Collect(), [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = True


def _runtime() -> tuple[Any, Any]:
    """ExecuTorch's bindings and the class of its runtime."""
    with quiet(), _without_compiler():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    return portable_lib, Runtime


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Lets the runtime's bindings import without ExecuTorch's compiler, which they need for one decorator.

    portable_lib imports executorch.exir._warnings; the package around it costs seconds and is no part of
    the runtime. An empty package of the same path stands in for it while the bindings load.
    """
    name = "executorch.exir"
    if name in sys.modules:
        yield
        return
    root = importlib.util.find_spec("executorch")
    stand_in = ModuleType(name)
    places = root.submodule_search_locations if root else None
    stand_in.__path__ = [str(Path(place) / "exir") for place in places or []]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


class ExecuTorchSession:
    """A loaded .pte. Inputs are made contiguous: channels_last gives wrong numbers in silence."""

    def __init__(
        self, file: Path, *, inputs: Sequence[TensorSpec], outputs: Sequence[str], threads: int
    ) -> None:
        self._library, self._runtime = _runtime()
        self._file = file
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._program: Any = None
        self._method: Any = None
        self.set_threads(threads)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """One call; the outputs are copies."""
        values = self._execute(self.prepare(inputs))
        return {name: value.numpy().copy() for name, value in zip(self._outputs, values, strict=True)}

    def prepare(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Tensor, ...]:
        """Contiguous tensors in the program's order. Raises ModelError for a wrong name or dtype."""
        return tuple(self._tensor(spec, inputs) for spec in self._inputs)

    def call(self, prepared: tuple[Tensor, ...]) -> None:
        """One call whose outputs are thrown away."""
        self._method.execute(prepared)

    def set_threads(self, threads: int) -> None:
        """Loads the program anew for a pool of so many threads: one that is loaded keeps the old pool, and
        its calls never return once that is gone.
        """
        self._program = self._method = None
        self._library._unsafe_reset_threadpool(threads)
        try:
            self._program = self._runtime.get().load_program(self._file)
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise IntegrityError(
                f"{self._file.name} is no program that this ExecuTorch loads", found=str(error)
            ) from error
        if self._method is None:
            raise IntegrityError(f"{self._file.name} has no method", expected="forward")

    def _execute(self, prepared: tuple[Tensor, ...]) -> list[Tensor]:
        try:
            values: list[Tensor] = list(self._method.execute(prepared))
        except RuntimeError as error:
            shapes = {spec.name: t.shape for spec, t in zip(self._inputs, prepared, strict=True)}
            raise refusal("program", shapes, self._inputs, str(error)) from error
        return values

    def _tensor(self, spec: TensorSpec, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Tensor:
        return torch.from_numpy(checked(spec, inputs))
