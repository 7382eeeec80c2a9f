"""From a module to an exported graph: torch.export with batch-norm folded, its inputs and outputs by name."""

import contextlib
import dataclasses
import inspect
import io
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from calibration.spec import TensorSpec
from exporters.quiet import quiet
from targets.errors import ModelError, UsageError, first_line

OWN_PACKAGES = ("targets", "calibration", "exporters", "deploy")
SITE_PACKAGES = "site-packages"
SMALL = 2
"""An example's size of a dynamic dimension: torch.export takes 0 and 1 for constants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """An output's name, shape (a name where it is dynamic) and dtype."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """An exported graph whose inputs are ordered as the program takes them."""

    graph: torch.fx.GraphModule
    arguments: tuple[tuple[Tensor, ...], dict[str, Tensor]]
    dynamic_shapes: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]

    def program(self, graph: torch.fx.GraphModule | None = None) -> ExportedProgram:
        """The graph, or a rewritten one of the same signature, as an ExportedProgram."""
        return _export(graph or self.graph, self.arguments, self.dynamic_shapes, fix=None)


def capture(module: nn.Module, inputs: Sequence[TensorSpec], *, output_names: Sequence[str] = ()) -> Captured:
    """Exports a module in evaluation mode and folds its batch-norms.

    Raises ModelError naming the operator and the user's line that torch.export refused.
    """
    captured = trace(module, inputs, output_names=output_names)
    _fold_batch_norms_(captured.graph)
    return captured


def trace(module: nn.Module, inputs: Sequence[TensorSpec], *, output_names: Sequence[str] = ()) -> Captured:
    """The module as torch.export gives it, its batch-norms not yet folded."""
    module = module.eval()
    check_forward(module, inputs)
    ordered, by_name = order_inputs(module, inputs)
    sizes = {
        name: min(max(low, SMALL), high) for spec in ordered for name, (low, high) in spec.bounds.items()
    }
    tensors = {spec.name: example(spec, **sizes) for spec in ordered}
    arguments = ((), tensors) if by_name else (tuple(tensors.values()), {})
    shapes = _dynamic_shapes(ordered)
    dynamic_shapes: Any = shapes if by_name else tuple(shapes.values())
    program = _export(
        module, arguments, dynamic_shapes, fix="write the branch with torch.cond, or make it a constant"
    )
    return Captured(
        graph=program.module(),
        arguments=arguments,
        dynamic_shapes=dynamic_shapes,
        inputs=ordered,
        outputs=_describe_outputs(program, ordered, output_names),
    )


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Keeps the choice of a CPU convolution library out of exported shapes.

    The choice depends on whether the batch reaches 16, and tracing takes that for a bound of the model:
    an example of 8 would limit the program to 15, one of 16 would fix it. Both switches are needed.
    """
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def check_forward(module: nn.Module, inputs: Sequence[TensorSpec]) -> None:
    """One call on the smallest example, so that a wrong shape is the user's line and not the exporter's.

    Raises ModelError.
    """
    smallest = {name: low for spec in inputs for name, (low, _) in spec.bounds.items()}
    try:
        with torch.no_grad():
            _register(call_module(module, inputs, {spec.name: example(spec, **smallest) for spec in inputs}))
    except (Exception, SystemExit) as error:
        line = user_line(error)
        raise ModelError(
            f"the model's forward raised on its example{f' at {line}' if line else ''}",
            found=first_line(error),
            expected="inputs as [inputs] declares them: "
            + ", ".join(f"{s.name} {list(s.shape)} {s.dtype}" for s in inputs),
            fix="correct [inputs] in deploy.toml, or the forward",
        ) from error


def order_inputs(module: nn.Module, inputs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], bool]:
    """The inputs as the module's forward takes them, and whether they go by name.

    Inputs whose names are all parameters of forward go by name; else they go in the order of deploy.toml.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    if all(spec.name in parameters for spec in inputs):
        return tuple(sorted(inputs, key=lambda spec: parameters.index(spec.name))), True
    return tuple(inputs), False


class Positional(nn.Module):
    """A module as a function of its inputs in order, wherever they stand among forward's parameters."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.inner = module
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Any:
        return self.inner(**dict(zip(self.names, tensors, strict=True)))


def positional(module: nn.Module, inputs: Sequence[TensorSpec]) -> nn.Module:
    """The module itself where its inputs are forward's first parameters, else a `Positional` around it."""
    ordered, by_name = order_inputs(module, inputs)
    names = [spec.name for spec in ordered]
    if not by_name or list(inspect.signature(module.forward).parameters)[: len(names)] == names:
        return module
    return Positional(module, names)


def call_module(module: nn.Module, inputs: Sequence[TensorSpec], arrays: Mapping[str, Tensor]) -> Any:
    """The module's answer to tensors by name."""
    ordered, by_name = order_inputs(module, inputs)
    if by_name:
        return module(**{spec.name: arrays[spec.name] for spec in ordered})
    return module(*(arrays[spec.name] for spec in ordered))


def example(spec: TensorSpec, **sizes: int) -> Tensor:
    """A tensor that fits the spec: seeded noise for floats, zeros and ones for the rest."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    shape = spec.sizes(**sizes)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def flatten_outputs(outputs: Any) -> list[Tensor]:
    """The tensors of whatever a forward returned: a tensor, tuple, dictionary or dataclass."""
    _register(outputs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def user_line(error: BaseException) -> str:
    """The last line of the user's own code in a traceback, as "model.py, line 12", else ""."""
    own = {Path(__file__).parent.parent / package for package in OWN_PACKAGES}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if (
            file.is_file()
            and SITE_PACKAGES not in file.parts
            and not any(file.is_relative_to(p) for p in own)
        ):
            if "lib" in file.parts and any(part.startswith("python3") for part in file.parts):
                continue
            return f"{file.name}, line {frame.lineno}: {frame.line}"
    return ""


def _export(
    module: nn.Module,
    arguments: tuple[tuple[Tensor, ...], dict[str, Tensor]],
    dynamic_shapes: Any,
    *,
    fix: str | None,
) -> ExportedProgram:
    printed = io.StringIO()  # on a refusal torch prints the graph it had so far
    try:
        with quiet(), contextlib.redirect_stderr(printed), plain_convolutions(), torch.no_grad():
            return torch.export.export(module, *arguments, dynamic_shapes=dynamic_shapes, strict=False)
    except (Exception, SystemExit) as error:
        line = user_line(error)
        operators = _last_operators(printed.getvalue())
        raise ModelError(
            f"torch.export refused the model{f' at {line}' if line else ''}",
            found=f"{first_line(error)}{f' after {operators}' if operators else ''}",
            expected="a forward whose control flow and shapes do not depend on values",
            fix=fix,
        ) from error


def _last_operators(printed: str) -> str:
    """The operators of the last source line in a graph that torch printed, as "aten.sum, aten.item"."""
    graph = printed.rpartition("# File: ")[2]
    return ", ".join(dict.fromkeys(re.findall(r"torch\.ops\.(\w+\.\w+)", graph)))


def _dynamic_shapes(inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    dims: dict[str, Any] = {}

    def dim(name: str, bounds: tuple[int, int]) -> Any:
        if bounds[0] == bounds[1]:
            return None
        return dims.setdefault(name, Dim(name, min=bounds[0], max=bounds[1]))

    return {
        spec.name: {
            axis: dim(size, spec.bounds[size])
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str)
        }
        for spec in inputs
    }


def _fold_batch_norms_(graph: torch.fx.GraphModule) -> None:
    """Folds each evaluation-mode batch-norm into the convolution before it."""
    with quiet():
        from torchao.quantization.pt2e.utils import _fuse_conv_bn_

        _fuse_conv_bn_(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _register(outputs: Any) -> None:
    """Makes a dataclass that a forward returned known to pytree, so that its fields are seen."""
    kind = type(outputs)
    if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        # ExecuTorch writes the name into the program: the folder of the user's file must not be in it.
        torch.export.register_dataclass(kind, serialized_type_name=f"user.{kind.__qualname__}")


def _describe_outputs(
    program: ExportedProgram, inputs: Sequence[TensorSpec], wanted: Sequence[str]
) -> tuple[OutputSpec, ...]:
    """Names from deploy.toml for tensors and tuples; a dictionary's own keys for the rest."""
    values = [
        node.meta["val"] for node in program.graph.output_node().args[0] if isinstance(node, torch.fx.Node)
    ]
    keys = _own_keys(program)
    names = (
        keys
        or list(wanted)
        or (["output"] if len(values) == 1 else [f"output_{i}" for i in range(len(values))])
    )
    if len(names) != len(values) or (keys and not set(wanted) <= set(keys)):
        raise UsageError(
            "[outputs] does not fit the model",
            found=", ".join(wanted),
            expected=f"the model's outputs: {', '.join(keys) or len(values)}",
            fix="correct the tables [outputs.NAME], in the model's order",
        )
    dimensions = _dimension_names(program, inputs)
    return tuple(
        OutputSpec(
            name=name,
            shape=tuple(
                size if isinstance(size, int) else dimensions.get(str(size), str(size))
                for size in value.shape
            ),
            dtype=str(value.dtype).removeprefix("torch."),
        )
        for name, value in zip(names, values, strict=True)
    )


def _own_keys(program: ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    if spec is None or spec.is_leaf() or spec.type in (tuple, list):
        return []
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(leaves)
    return ["_".join(_key_name(key) for key in path) for path, _ in paths]


def _key_name(key: Any) -> str:
    return str(next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)))


def _dimension_names(program: ExportedProgram, inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """The user's name of each symbol, read off the inputs."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    named: dict[str, str] = {}
    for spec, user_input in zip(inputs, program.graph_signature.user_inputs, strict=True):
        sizes = placeholders[str(user_input)].meta["val"].shape
        named.update(
            {str(size): name for size, name in zip(sizes, spec.shape, strict=True) if isinstance(name, str)}
        )
    return named
