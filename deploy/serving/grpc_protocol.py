"""Open Inference Protocol v2 over gRPC as pure functions: messages to arrays by name and back.

What is asked of names, shapes, datatypes and numbers is what the JSON form asks; see protocol.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from calibration.spec import TensorSpec
from deploy.serving.grpc_messages import message
from deploy.serving.protocol import (
    DATATYPES,
    Array,
    Parsed,
    RequestError,
    array_of_bytes,
    array_of_numbers,
    check_agreement,
    check_interface,
    chosen_outputs,
    named,
)

CONTENTS = {
    "bool": "bool_contents",
    "uint8": "uint_contents",
    "int8": "int_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
}
"""Where each dtype's numbers stand; float16 has none and comes as bytes."""


def decoded(name: str, data: bytes) -> Any:
    """The message in these bytes. Raises RequestError where they are none."""
    try:
        return message(name).FromString(data)
    except DecodeError as error:
        raise RequestError(400, "message", f"is no {name}") from error


def parse(request: Any, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> Parsed:
    """A ModelInferRequest's arrays, checked against the inputs. Raises RequestError naming the field."""
    by_name = named([tensor.name for tensor in request.inputs], specs)
    blobs = request.raw_input_contents
    if blobs and len(blobs) != len(request.inputs):
        raise RequestError(
            400, "raw_input_contents", f"has {len(blobs)} entries for {len(request.inputs)} inputs"
        )
    arrays = {}
    for index, tensor in enumerate(request.inputs):
        spec, field, shape = by_name[tensor.name], f"inputs[{index}]", list(tensor.shape)
        check_interface(tensor.datatype, shape, spec, field)
        if blobs:
            if tensor.HasField("contents"):
                raise RequestError(400, f"{field}.contents", "stands beside raw_input_contents")
            arrays[tensor.name] = _from_raw(blobs[index], shape, spec, f"raw_input_contents[{index}]")
        else:
            arrays[tensor.name] = _from_contents(tensor.contents, shape, spec, f"{field}.contents")
    check_agreement(arrays, specs)
    chosen = chosen_outputs([output.name for output in request.outputs], outputs)
    return Parsed(arrays=arrays, id=request.id, outputs=tuple((name, True) for name in chosen))


def respond(answers: Mapping[str, Array], parsed: Parsed, *, model: str, version: str) -> bytes:
    """A ModelInferResponse with raw contents, which every datatype has."""
    response = message("ModelInferResponse")(model_name=model, model_version=version, id=parsed.id)
    for name, _ in parsed.outputs:
        array = np.ascontiguousarray(answers[name])
        response.outputs.add(name=name, datatype=DATATYPES[str(array.dtype)], shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return bytes(response.SerializeToString())


def _from_raw(blob: bytes, shape: list[int], spec: TensorSpec, field: str) -> Array:
    expected = math.prod(shape) * np.dtype(spec.dtype).itemsize
    if len(blob) != expected:
        raise RequestError(400, field, f"has {len(blob)} bytes, the shape asks for {expected}")
    return array_of_bytes(blob, 0, shape, spec.dtype, field)


def _from_contents(contents: Any, shape: list[int], spec: TensorSpec, field: str) -> Array:
    own = CONTENTS.get(spec.dtype)
    for found, _ in contents.ListFields():
        if found.name != own:
            expected = own or "raw_input_contents"
            raise RequestError(400, f"{field}.{found.name}", f"is set, expected {expected}")
    if own is None:
        raise RequestError(400, field, f"is empty, {DATATYPES[spec.dtype]} comes in raw_input_contents")
    return array_of_numbers(list(getattr(contents, own)), shape, spec, f"{field}.{own}")
