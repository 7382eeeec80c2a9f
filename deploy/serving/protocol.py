"""Open Inference Protocol v2 as pure functions: bytes to arrays by name and back.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol; the binary tensor
extension is Triton's,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from calibration.spec import TensorSpec

Array = np.ndarray[Any, Any]

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
LARGEST_JSON_HEADER = 1 << 20


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, the field that is wrong, and why."""

    def __init__(self, status: int, field: str, message: str) -> None:
        self.status = status
        self.field = field
        super().__init__(f"{field}: {message}" if field else message)

    def body(self) -> bytes:
        """The JSON answer."""
        return msgspec.json.encode({"error": str(self), "field": self.field})


class TensorParameters(msgspec.Struct, frozen=True):
    """What an input says of its data."""

    binary_data_size: int | None = None


class InputTensor(msgspec.Struct, frozen=True):
    """An input of a request; `data` is read once its dtype is known."""

    name: str
    shape: list[int]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: msgspec.Raw = msgspec.Raw()


class OutputParameters(msgspec.Struct, frozen=True):
    """How an output is wanted."""

    binary_data: bool | None = None


class WantedOutput(msgspec.Struct, frozen=True):
    """An output that a request asks for."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(msgspec.Struct, frozen=True):
    """What holds for the whole request."""

    binary_data_output: bool = False


class InferRequest(msgspec.Struct, frozen=True):
    """A request's JSON."""

    inputs: list[InputTensor]
    id: str = ""
    outputs: list[WantedOutput] = []
    parameters: RequestParameters = RequestParameters()


class OutputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """An output of an answer: its data, or the size of what follows the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[Any] | None = None


class InferResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer's JSON."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A request that fits: its arrays by name, and which outputs it wants in which form."""

    arrays: dict[str, Array]
    id: str
    outputs: tuple[tuple[str, bool], ...]


_REQUEST = msgspec.json.Decoder(InferRequest)
_FLOATS = msgspec.json.Decoder(list[float])
_INTEGERS = msgspec.json.Decoder(list[int])
_BOOLEANS = msgspec.json.Decoder(list[bool])
_ANYTHING = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()


def parse(
    body: bytes, header_length: str | None, specs: Sequence[TensorSpec], outputs: Sequence[str]
) -> Parsed:
    """A request's arrays, checked against the model's inputs. Raises RequestError naming the field."""
    text, blob = _split(body, header_length)
    try:
        request = _REQUEST.decode(text)
    except msgspec.ValidationError as error:
        raise RequestError(400, _path(error), _reason(error)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(400, "body", f"is no JSON: {_short(error)}") from error
    by_name = named([tensor.name for tensor in request.inputs], specs)
    arrays, offset = {}, 0
    for index, tensor in enumerate(request.inputs):
        spec, field = by_name[tensor.name], f"inputs[{index}]"
        check_interface(tensor.datatype, tensor.shape, spec, field)
        size = tensor.parameters.binary_data_size
        if size is None:
            arrays[tensor.name] = _from_json(tensor, spec, field)
        else:
            arrays[tensor.name] = _from_binary(tensor, spec, field, blob, offset, size)
            offset += size
    if offset != len(blob):
        raise RequestError(
            400, "binary data", f"{len(blob)} bytes follow the JSON, the inputs claim {offset}"
        )
    check_agreement(arrays, specs)
    return Parsed(arrays=arrays, id=request.id, outputs=_wanted(request, outputs))


def respond(
    answers: Mapping[str, Array], parsed: Parsed, *, model: str, version: str
) -> tuple[bytes, int | None]:
    """An answer's body, and the length of its JSON where binary data follows."""
    tensors, blobs = [], []
    for name, binary in parsed.outputs:
        array = np.ascontiguousarray(answers[name])
        datatype = DATATYPES[str(array.dtype)]
        shape = list(array.shape)
        if binary:
            blobs.append(array.tobytes())
            size = {"binary_data_size": len(blobs[-1])}
            tensors.append(OutputTensor(name=name, datatype=datatype, shape=shape, parameters=size))
        else:
            data = array.ravel().tolist()
            tensors.append(OutputTensor(name=name, datatype=datatype, shape=shape, data=data))
    response = InferResponse(model_name=model, model_version=version, outputs=tensors, id=parsed.id)
    text = _ENCODER.encode(response)
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON and what follows it."""
    if header_length is None:
        return body, b""
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise RequestError(400, "Inference-Header-Content-Length", f"is {header_length[:20]!r}, no size")
    length = int(header_length)
    if length > min(len(body), LARGEST_JSON_HEADER):
        raise RequestError(
            400, "Inference-Header-Content-Length", f"is {length}, the body has {len(body)} bytes"
        )
    return body[:length], body[length:]


def named(names: Sequence[str], specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs by name. Raises RequestError where a request has others, or one twice."""
    by_name = {spec.name: spec for spec in specs}
    if sorted(names) != sorted(by_name):
        raise RequestError(400, "inputs", f"found {_listed(names)}, expected {_listed(list(by_name))}")
    return by_name


def check_interface(datatype: str, shape: Sequence[int], spec: TensorSpec, field: str) -> None:
    """Raises RequestError for a datatype or a shape that the input does not take."""
    expected = DATATYPES[spec.dtype]
    if datatype != expected:
        raise RequestError(400, f"{field}.datatype", f"is {datatype[:20]!r}, expected {expected}")
    if not spec.admits(shape):
        shown = str(list(shape[:8]))[:100]
        raise RequestError(400, f"{field}.shape", f"is {shown}, expected {shape_text(spec)}")


def shape_text(spec: TensorSpec) -> str:
    """A shape for a person: "[1 to 64, 1, 8, 8]"."""
    sizes = [str(low) if low == high else f"{low} to {high}" for low, high in spec.ranges]
    return f"[{', '.join(sizes)}]"


def _from_json(tensor: InputTensor, spec: TensorSpec, field: str) -> Array:
    raw = bytes(tensor.data)
    if not raw:
        raise RequestError(400, f"{field}.data", "is missing")
    dtype = np.dtype(spec.dtype)
    decoder: Any = {"f": _FLOATS, "b": _BOOLEANS}.get(dtype.kind, _INTEGERS)
    try:
        values = decoder.decode(raw)
    except msgspec.ValidationError:
        values = _flattened(raw, dtype, tensor.shape, field)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(400, f"{field}.data", _short(error)) from error
    return array_of_numbers(values, tensor.shape, spec, f"{field}.data")


def array_of_numbers(values: Sequence[Any], shape: Sequence[int], spec: TensorSpec, field: str) -> Array:
    """Flat numbers as an input's array. Raises RequestError where they are too many, too few or too large."""
    if len(values) != math.prod(shape):
        raise RequestError(400, field, f"has {len(values)} numbers, the shape asks for {math.prod(shape)}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=spec.dtype).reshape(shape)
    except (OverflowError, ValueError, TypeError) as error:
        raise RequestError(400, field, f"does not fit {DATATYPES[spec.dtype]}") from error
    return _finite(array, field)


def _flattened(raw: bytes, dtype: Any, shape: list[int], field: str) -> list[Any]:
    """Nested lists of the tensor's shape as one list. Raises RequestError for anything else."""
    kinds = {"f": (int, float), "b": (bool,)}.get(dtype.kind, (int,))
    try:
        level: list[Any] = [_ANYTHING.decode(raw)]
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(400, f"{field}.data", _short(error)) from error
    for size in shape:
        if not all(isinstance(row, list) and len(row) == size for row in level):
            raise RequestError(400, f"{field}.data", f"is neither flat nor nested as {shape}")
        level = [value for row in level for value in row]
    if not all(type(value) in kinds for value in level):
        raise RequestError(400, f"{field}.data", f"holds something else than {dtype} numbers")
    return level


def _from_binary(
    tensor: InputTensor, spec: TensorSpec, field: str, blob: bytes, offset: int, size: int
) -> Array:
    dtype = np.dtype(spec.dtype)
    expected = math.prod(tensor.shape) * dtype.itemsize
    if bytes(tensor.data):
        raise RequestError(400, f"{field}.data", "stands beside binary data")
    if size != expected or offset + size > len(blob):
        raise RequestError(
            400,
            f"{field}.parameters.binary_data_size",
            f"is {size}, the shape asks for {expected}, {max(0, len(blob) - offset)} bytes are there",
        )
    return array_of_bytes(blob, offset, tensor.shape, dtype, f"{field}.data")


def array_of_bytes(blob: bytes, offset: int, shape: Sequence[int], dtype: Any, field: str) -> Array:
    """The numbers that start there, which are all in `blob`. Raises RequestError where they are none."""
    count = math.prod(shape)
    flat = np.frombuffer(blob, dtype, count=count, offset=offset)
    array = flat.reshape(shape).copy()  # aligned and writable, which runtimes rely on
    if array.dtype.kind == "b" and (np.frombuffer(blob, np.uint8, count=count, offset=offset) > 1).any():
        raise RequestError(400, field, "holds something else than 0 and 1")
    return _finite(array, field)


def _finite(array: Array, field: str) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError(400, field, f"holds NaN, infinity, or numbers too large for {array.dtype}")
    return array


def check_agreement(arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """Raises RequestError where a named dimension has not one size in all inputs."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for name, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(name, str) and sizes.setdefault(name, size) != size:
                raise RequestError(
                    400, "inputs", f"{name} is {size} in {spec.name} and {sizes[name]} in another"
                )


def _wanted(request: InferRequest, outputs: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    default = request.parameters.binary_data_output
    chosen = chosen_outputs([output.name for output in request.outputs], outputs)
    asked = {output.name: output.parameters.binary_data for output in request.outputs}
    return tuple((name, default if (binary := asked.get(name)) is None else binary) for name in chosen)


def chosen_outputs(names: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """The outputs that a request names, all where it names none. Raises RequestError for unknown ones."""
    for index, name in enumerate(names):
        if name not in outputs:
            raise RequestError(
                400, f"outputs[{index}].name", f"is {name[:40]!r}, expected {_listed(outputs)}"
            )
    if len(set(names)) < len(names):
        raise RequestError(400, "outputs", "names one twice")
    return tuple(names or outputs)


def _path(error: msgspec.ValidationError) -> str:
    """The field that msgspec names, "inputs[0].shape" for "... - at `$.inputs[0].shape`"."""
    _, found, path = str(error).partition(" - at `$")
    return path.rstrip("`").lstrip(".") if found else "body"


def _reason(error: msgspec.ValidationError) -> str:
    return str(error).partition(" - at ")[0][:200]


def _short(error: BaseException) -> str:
    return str(error)[:120]


def _listed(names: Sequence[str]) -> str:
    shown = [name[:40] for name in names[:8]]
    return ", ".join(shown) + (" and more" if len(names) > 8 else "") if names else "none"
