"""A foreign ONNX model as the project's model: checked first, run by ONNX Runtime as its own reference.

Nothing of it is code, but its external data may point anywhere and its sizes may lie.
"""

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.spec import TensorSpec
from deploy.cache import digest, file_digest
from exporters import external_data
from targets.errors import MissingRequirementError, ModelError, UsageError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto

SUFFIX = ".onnx"
LARGEST_BYTES = 2**31 - 1
OLDEST_OPSET, QDQ_OPSET = 7, 13
MOST_BATCH = 64
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
SHOWN = 5
TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64",
}  # fmt: skip


def is_model(source: str | Path) -> bool:
    """Whether a [model] source names an ONNX file."""
    return Path(source).suffix == SUFFIX


def default_inputs(file: Path) -> dict[str, dict[str, Any]]:
    """The tables [inputs.NAME] that the model declares; a first dimension without a size is the batch."""
    tables: dict[str, dict[str, Any]] = {}
    for value in _inputs(_parsed(file)):
        shape: list[int | str] = []
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            name = "batch" if axis == 0 else dimension.dim_param or f"{value.name}_{axis}"
            shape.append(dimension.dim_value if dimension.dim_value > 0 else _word(name))
        dynamic = {size: {"min": 1, "max": MOST_BATCH} for size in shape if isinstance(size, str)}
        tables[value.name] = {"shape": shape, "dtype": _dtype(value), "dynamic": dynamic}
    return tables


def fingerprint(file: Path) -> str:
    """The hash of the model and of its external data. Raises as `read`."""
    parts = [file_digest(file)]
    parts += [file_digest(file.parent / name) for name in sorted(_locations(_parsed(file)))]
    return digest(parts)


def read(file: Path) -> "ModelProto":
    """The model, valid. External data stay outside, but for shapes and the like; they are beside `file`.

    Raises UsageError where the file is missing, MissingRequirementError where ONNX is not installed, and
    ModelError for what is damaged, too large, of an unknown opset or domain, inconsistent, or reaches outside
    its folder.
    """
    model = _parsed(file)
    _check_external(model, file)
    _check_extents(model, file)
    _check_opsets(model, file)
    import onnx

    try:
        external_data.load_(
            external_data.tensors_of(model.graph), file.parent, below=external_data.SMALLEST_BYTES
        )
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # onnx raises kinds of its own, and whatever protobuf raises
        raise ModelError(
            f"{file.name} is no valid ONNX model",
            found=first_line(error),
            expected="a graph that onnx.checker accepts",
            fix="export it again",
        ) from error
    return model


def prepared(file: Path, specs: Sequence[TensorSpec]) -> "ModelProto":
    """The model as the exporters start from it: every node named, dimensions by the project's names, an opset
    that per-channel quantization needs.

    Raises as `read`, and UsageError where [inputs] do not fit the model's own.
    """
    import onnx

    model = read(file)
    _check_inputs(model, specs, file)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < QDQ_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, QDQ_OPSET)
        except Exception as error:  # whatever the converter raises
            raise ModelError(
                f"{file.name} cannot be brought to opset {QDQ_OPSET}",
                found=f"opset {opset}: {first_line(error)}",
                fix=f"export it again with opset {QDQ_OPSET} or later",
            ) from error
    _name_nodes_(model.graph)
    by_name = {spec.name: spec for spec in specs}
    for value in _inputs(model):
        for dimension, size in zip(value.type.tensor_type.shape.dim, by_name[value.name].shape, strict=True):
            if isinstance(size, str):
                dimension.ClearField("dim_value")
                dimension.dim_param = size
    return model


def _name_nodes_(graph: Any) -> None:
    """Gives nodes without a name one that no other has."""
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        name = f"{node.op_type}_{index}"
        while not node.name and name in taken:
            name = f"{name}_"
        node.name = node.name or name
        taken.add(node.name)


def outputs_of(
    model: "ModelProto", wanted: Sequence[str], file: Path
) -> list[tuple[str, list[int | str], str]]:
    """Each output's name, shape and dtype. Raises UsageError where [outputs] names one that is not there."""
    found = []
    for value in model.graph.output:
        shape: list[int | str] = []
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            name = dimension.dim_param or (f"size_{axis}" if axis else "batch")
            shape.append(dimension.dim_value if dimension.dim_value > 0 else _word(name))
        found.append((value.name, shape, _dtype(value)))
    names = [name for name, _, _ in found]
    if not set(wanted) <= set(names):
        raise UsageError(
            "[outputs] does not fit the model",
            found=", ".join(wanted),
            expected=f"outputs of {file.name}: {', '.join(names)}",
            fix="correct the tables [outputs.NAME]",
        )
    return found


def cost(model: "ModelProto", specs: Sequence[TensorSpec]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one sample in convolutions and matrix products."""
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    by_name = {spec.name: spec for spec in specs}
    for value in _inputs(sized):
        spec = by_name[value.name]
        smallest = spec.sizes(**{name: low for name, (low, _) in spec.bounds.items()})
        for dimension, size in zip(value.type.tensor_type.shape.dim, smallest, strict=True):
            dimension.ClearField("dim_param")
            dimension.dim_value = size
    for value in sized.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.ClearField("dim_param")
            dimension.ClearField("dim_value")
    del sized.graph.value_info[:]
    sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*sized.graph.value_info, *sized.graph.input, *sized.graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in sized.graph.initializer}
    first = specs[0]
    batch = first.sizes(**{name: low for name, (low, _) in first.bounds.items()})[0] if first.shape else 1
    macs = sum(_macs(node, shapes) for node in sized.graph.node)
    floats = (
        tensor for tensor in model.graph.initializer if TYPES.get(tensor.data_type, "").startswith("float")
    )
    return sum(math.prod(tensor.dims) for tensor in floats), round(macs / max(1, batch))


def load_module(file: Path, specs: Sequence[TensorSpec]) -> Any:
    """The model as a torch module that asks ONNX Runtime, its graph not optimised: the float reference."""
    from torch import Tensor, from_numpy, nn

    model = prepared(file, specs)
    session = _session(model, file)

    class OnnxModule(nn.Module):
        """An ONNX model as a function of tensors."""

        names = tuple(spec.name for spec in specs)

        def forward(self, *tensors: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
            """The model's outputs, in its order."""
            given = {**dict(zip(self.names, tensors, strict=False)), **named}
            feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in given.items()}
            return tuple(from_numpy(array) for array in session.run(None, feeds))

    module = OnnxModule()
    if all(name.isidentifier() for name in module.names):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in module.names])
        OnnxModule.forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[inspect.Parameter("self", kind), *signature.parameters.values()]
        )
    return module.eval()


def _session(model: "ModelProto", file: Path) -> Any:
    from exporters.onnxruntime import unoptimised_session

    try:
        return unoptimised_session(model, file.parent)
    except Exception as error:  # the runtime's own exceptions share no base
        raise ModelError(
            f"{file.name} cannot be run",
            found=first_line(error),
            expected="operators that ONNX Runtime has on the CPU",
            fix="replace the operator it names",
        ) from error


def _parsed(file: Path) -> "ModelProto":
    """The model's own bytes, its external data left outside."""
    if not file.is_file():
        raise UsageError(
            f"{file.name} is missing",
            found=f"no file at {file}",
            expected="an ONNX model",
            fix="correct [model] source; paths are relative to deploy.toml",
        )
    if file.stat().st_size > LARGEST_BYTES:
        raise ModelError(
            f"{file.name} is too large",
            found=f"{file.stat().st_size / 1e9:.1f} GB",
            expected="at most 2 GB",
            fix="keep the weights as external data beside it",
        )
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise MissingRequirementError(
            "an ONNX model cannot be read",
            found="no package onnx, onnxruntime",
            expected="the extra 'onnx'",
            fix="pip install 'edge-deploy[onnx]'",
        )
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own kinds
        raise ModelError(
            f"{file.name} is no ONNX model", found=first_line(error), fix="export it again"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{file.name} holds no graph", expected="nodes and outputs", fix="export it again")
    return model


def _locations(model: "ModelProto") -> set[str]:
    """The files that hold external data."""
    return {
        entry.value
        for tensor in external_data.tensors_of(model.graph)
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == tensor.EXTERNAL
    }


def _check_external(model: "ModelProto", file: Path) -> None:
    """External data lie beside the model, in regular files of one name. Raises ModelError."""
    folder = file.parent.resolve()
    for name in sorted(_locations(model)):
        path = folder / name
        wrong = None
        if os.path.isabs(name) or not Path(os.path.normpath(path)).is_relative_to(folder):
            wrong = "lies outside the model's folder"
        elif path.is_symlink() or not path.resolve().is_relative_to(folder):
            wrong = "is a link"
        elif not path.is_file():
            wrong = "is missing"
        elif path.stat().st_nlink > 1:
            wrong = "has a second name (a hard link), which may lie outside the folder"
        if wrong:
            raise ModelError(
                f"{file.name} names external data that cannot be used",
                found=f"{name[:100]!r} {wrong}",
                expected="a file in the model's folder",
                fix="copy the data beside the model",
            )


def _check_extents(model: "ModelProto", file: Path) -> None:
    """Every tensor's part of the external data is there and has the size of its shape. Raises ModelError."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    for tensor in filter(uses_external_data, external_data.tensors_of(model.graph)):
        try:
            told, wanted = ExternalDataInfo(tensor), external_data.size_bytes(tensor)
        except (ValueError, KeyError) as error:
            raise _wrong_extent(tensor, file, f"a size or type that is none: {error}") from error
        size, start = (file.parent / told.location).stat().st_size, told.offset or 0
        length = size - start if told.length is None else told.length
        if start + length > size or length != wanted:
            raise _wrong_extent(tensor, file, f"{length} bytes from {start} of {size}, {wanted} by its shape")


def _wrong_extent(tensor: Any, file: Path, found: str) -> ModelError:
    return ModelError(
        f"{file.name} names external data that do not fit {tensor.name[:100]!r}",
        found=found,
        expected="as many bytes as its shape and type take",
        fix="export it again",
    )


def _check_opsets(model: "ModelProto", file: Path) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain not in DOMAINS:
            raise ModelError(
                f"{file.name} needs operators of its own",
                found=f"the domain {entry.domain[:60]!r}",
                expected="operators of ONNX and of ONNX Runtime",
                fix="export it without custom operators",
            )
        if entry.domain in ("", "ai.onnx") and not OLDEST_OPSET <= entry.version <= newest:
            raise ModelError(
                f"{file.name} has an unknown opset",
                found=entry.version,
                expected=f"{OLDEST_OPSET} to {newest}",
                fix="export it again with a known opset",
            )
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        raise ModelError(f"{file.name} states no opset", expected=f"{OLDEST_OPSET} to {newest}")


def _inputs(model: "ModelProto") -> list[Any]:
    """The graph's inputs that are no weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _check_inputs(model: "ModelProto", specs: Sequence[TensorSpec], file: Path) -> None:
    """Raises UsageError where [inputs] names, dtypes or sizes are not the model's."""
    values = {value.name: value for value in _inputs(model)}
    if values.keys() != {spec.name for spec in specs}:
        raise _misfit(file, ", ".join(spec.name for spec in specs), ", ".join(values))
    for spec in specs:
        value = values[spec.name]
        own = [
            d.dim_value if d.dim_value > 0 else (d.dim_param or "any")
            for d in value.type.tensor_type.shape.dim
        ]
        fits = len(own) == len(spec.shape) and all(
            isinstance(mine, str) or mine == declared for mine, declared in zip(own, spec.shape, strict=True)
        )
        if not fits or _dtype(value) != spec.dtype:
            found = f"{spec.name} {list(spec.shape)} {spec.dtype}"
            raise _misfit(file, found, f"{spec.name} {own} {_dtype(value)}")


def _misfit(file: Path, found: str, expected: str) -> UsageError:
    return UsageError(
        f"[inputs] does not fit {file.name}",
        found=found,
        expected=expected,
        fix="correct [inputs] in deploy.toml",
    )


def _dtype(value: Any) -> str:
    kind = value.type.tensor_type.elem_type
    if kind not in TYPES:
        raise ModelError(
            f"{value.name} has a type that cannot be served",
            found=f"ONNX type {kind}",
            expected=", ".join(TYPES.values()),
        )
    return TYPES[kind]


def _word(name: str) -> str:
    """A dimension's name that deploy.toml takes."""
    word = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
    return word if word and not word[0].isdigit() else f"size_{word}"


def _macs(node: Any, shapes: Mapping[str, list[int]]) -> int:
    """Multiply-accumulates of a node; 0 for what is no convolution or matrix product, or of unknown size."""
    inputs, output = [shapes.get(name, []) for name in node.input], shapes.get(node.output[0], [])
    if not output or not all(inputs[:2]):
        return 0
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type in ("MatMul", "Gemm"):
        flipped = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(output) * inputs[0][-2 if flipped else -1]
    return 0
