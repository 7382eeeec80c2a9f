"""The messages of Open Inference Protocol v2 over gRPC, built from a table: nothing generated is kept.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/open_inference_grpc.proto
has all of them but RepositoryIndex, which is Triton's model repository extension. They live in a pool of
their own, so that a client in the same process may register its own messages by the same names.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
PARAMETERS = "map<string, InferParameter>"
_TENSOR = "string name = 1; string datatype = 2; repeated int64 shape = 3"
_WITH_DATA = f"{_TENSOR}; {PARAMETERS} parameters = 4; InferTensorContents contents = 5"

MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse": (
        "string name = 1; repeated string versions = 2; string platform = 3; "
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4; "
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5"
    ),
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "InferParameter": (
        "oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3; "
        "oneof double double_param = 4; oneof uint64 uint64_param = 5"
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1; repeated int32 int_contents = 2; "
        "repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4; "
        "repeated uint64 uint64_contents = 5; repeated float fp32_contents = 6; "
        "repeated double fp64_contents = 7; repeated bytes bytes_contents = 8"
    ),
    "ModelInferRequest": (
        f"string model_name = 1; string model_version = 2; string id = 3; {PARAMETERS} parameters = 4; "
        "repeated ModelInferRequest.InferInputTensor inputs = 5; "
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6; "
        "repeated bytes raw_input_contents = 7"
    ),
    "ModelInferRequest.InferInputTensor": _WITH_DATA,
    "ModelInferRequest.InferRequestedOutputTensor": f"string name = 1; {PARAMETERS} parameters = 2",
    "ModelInferResponse": (
        f"string model_name = 1; string model_version = 2; string id = 3; {PARAMETERS} parameters = 4; "
        "repeated ModelInferResponse.InferOutputTensor outputs = 5; repeated bytes raw_output_contents = 6"
    ),
    "ModelInferResponse.InferOutputTensor": _WITH_DATA,
    "RepositoryIndexRequest": "string repository_name = 1; bool ready = 2",
    "RepositoryIndexResponse": "repeated RepositoryIndexResponse.ModelIndex models = 1",
    "RepositoryIndexResponse.ModelIndex": (
        "string name = 1; string version = 2; string state = 3; string reason = 4"
    ),
}
"""Fields as in a .proto file, but for `oneof` before those of a message's only choice."""

_Field = descriptor_pb2.FieldDescriptorProto


@cache
def message(name: str) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in MESSAGES.items():
        outer, _, own = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
        _fill(made[name], name, fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _fill(descriptor: Any, path: str, fields: str) -> None:
    for words, name, number in _parsed(fields):
        *before, kind = words
        field = descriptor.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
        if kind == PARAMETERS:
            _add_entry(descriptor)
            before, kind = ["repeated"], f"{path}.ParametersEntry"
        if "repeated" in before:
            field.label = _Field.LABEL_REPEATED
        if "oneof" in before:
            field.oneof_index = 0
            if not descriptor.oneof_decl:
                descriptor.oneof_decl.add(name="parameter_choice")
        _set_type(field, kind)


def _parsed(fields: str) -> Iterator[tuple[list[str], str, int]]:
    """The words before a field's name, its name and its number."""
    for text in filter(None, fields.split("; ")):
        declared, _, number = text.partition(" = ")
        kind, _, name = declared.rpartition(" ")
        yield [kind] if kind == PARAMETERS else kind.split(), name, int(number)


def _add_entry(descriptor: Any) -> None:
    """A map is a repeated message of keys and values."""
    entry = descriptor.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    for number, (name, kind) in enumerate((("key", "string"), ("value", "InferParameter")), 1):
        _set_type(entry.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL), kind)


def _set_type(field: Any, kind: str) -> None:
    if kind[0].isupper():
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
