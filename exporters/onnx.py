"""ONNX models by torch's dynamo exporter: the form that several runtimes start from."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.spec import TensorSpec
from exporters import external_data
from exporters.external_data import graphs_of
from exporters.quiet import quiet
from targets.errors import DeployError, ModelError, first_line

OPSET = 18
IR_VERSION = 10
WEIGHTS = "weights"
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """A float ONNX model on disk.

    `inputs` stand in the model's order; `modules` maps a node's name to the path of the user's module that it
    came from; `companions` hold the weights of a model too large for one file.
    """

    file: Path
    inputs: tuple[TensorSpec, ...]
    modules: Mapping[str, str]
    companions: tuple[Path, ...] = ()

    def nodes_in(self, paths: tuple[str, ...]) -> list[str]:
        """The nodes of these modules and of all below them."""
        return [
            node
            for node, path in self.modules.items()
            if any(path == name or path.startswith(f"{name}.") for name in paths)
        ]


def to_onnx(captured: Any, file: Path) -> OnnxModel:
    """Writes a captured graph as ONNX, dynamic dimensions by the names that deploy.toml gives them.

    What torch notes beside each node (source lines with their folders) is left out of the file. Raises
    ModelError for operators that have no ONNX form.
    """

    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        model = _exported(captured, Path(scratch))
        modules = {node.name: _module_path(node) for node in model.graph.node}
        _rename_(
            model.graph,
            [spec.name for spec in captured.inputs],
            [output.name for output in captured.outputs],
        )
        _strip_(model)
        _forget_weight_shapes_(model.graph)
        _name_dimensions_(model, captured)
        companions = external_data.save(model, file, folder=Path(scratch))
    return OnnxModel(file=file, inputs=captured.inputs, modules=modules, companions=companions)


def add_outputs_(model: Any, names: Sequence[str]) -> list[str]:
    """Makes values inside a model outputs too; returns those that it has."""
    outputs = {value.name for value in model.graph.output}
    made = {name for node in model.graph.node for name in node.output} - outputs
    found = [name for name in names if name in made]
    for name in found:
        model.graph.output.add(name=name)
    return found


def _exported(captured: Any, scratch: Path) -> Any:
    """The graph as torch writes it; weights that one file cannot hold go into `scratch` without a copy."""
    import onnx_ir
    import torch

    try:
        with quiet():
            program = torch.onnx.export(
                captured.program(),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            weights = (value.const_value for value in program.model.graph.initializers.values())
            if sum(tensor.nbytes for tensor in weights if tensor) > external_data.LARGEST_BYTES:
                onnx_ir.external_data.unload_from_model(program.model, scratch, WEIGHTS)
            return program.model_proto
    except DeployError:
        raise
    except Exception as error:
        raise ModelError(
            "the model cannot be written as ONNX",
            found=first_line(error.__cause__ or error),
            fix="replace the operator it names, or choose --runtime executorch",
        ) from error


def _rename_(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Gives inputs and outputs the user's names, and values that already have one of those another.

    torch gives names without looking: an output called "embedding" met a value of that name inside.
    """
    import onnx

    new: dict[str, str] = {}
    for value, name in zip(graph.input, inputs, strict=True):
        new[value.name] = name
    fresh = []
    for value, name in zip(graph.output, outputs, strict=True):
        if value.name in new:  # an input handed on, or one value under two names
            copy = onnx.helper.make_node("Identity", [value.name], [name], name=f"{name}_copy")
            fresh.append((copy, value))
        else:
            new[value.name] = name
    for copy, value in fresh:
        graph.node.append(copy)
        value.name = copy.output[0]
    wanted = {*inputs, *outputs}
    names = {name for each in graphs_of(graph) for node in each.node for name in (*node.input, *node.output)}
    names |= {tensor.name for each in graphs_of(graph) for tensor in each.initializer}
    taken = names | wanted
    for name in sorted((names & wanted) - new.keys() - {copy.output[0] for copy, _ in fresh}):
        inner = next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)
        new[name] = inner
        taken.add(inner)
    for each in graphs_of(graph):
        for node in each.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
        for value in (*each.initializer, *each.value_info, *each.input, *each.output):
            value.name = new.get(value.name, value.name)


def _module_path(node: Any) -> str:
    """The path of the user's module that a node came from, "" for the model itself."""
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    scopes = json.loads(text.replace("'", '"'))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _strip_(model: Any) -> None:
    """Removes the notes on nodes, values and functions: they hold paths of the machine that exported."""
    for held in (model, model.graph, *model.functions):
        del held.metadata_props[:]
        held.doc_string = ""
    for graph in graphs_of(model.graph):
        for entry in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            del entry.metadata_props[:]
            entry.doc_string = ""
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edge-deploy", ""


def _forget_weight_shapes_(graph: Any) -> None:
    """Weights state their own shape; a second statement goes stale where a quantizer transposes one."""
    weights = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _name_dimensions_(model: Any, captured: Any) -> None:
    """Gives dynamic dimensions the user's names instead of torch's symbols."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.input, captured.inputs, strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(size, str):
                names[dimension.dim_param] = size
                dimension.ClearField("dim_value")
                dimension.dim_param = size
    for value in (*model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def drop_unused_(graph: Any) -> None:
    """Removes weights that no node reads, in the graph or inside its nodes, and that are no output."""
    used = {name for each in graphs_of(graph) for node in each.node for name in node.input}
    used |= {value.name for each in graphs_of(graph) for value in each.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
