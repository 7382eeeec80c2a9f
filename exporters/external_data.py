"""Weights of an ONNX model in a file beside it, where one file cannot hold both.

The file is named by its content and the model names it, so both work wherever they lie together, whatever the
model's own file is called.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

LARGEST_BYTES = 2_000_000_000
"""Of weights in the model's own file: protobuf holds 2**31 - 1 bytes, and the graph needs some of them."""
SMALLEST_BYTES = 1024
"""Smaller tensors stay in the model: shapes and axes are among them, which every reader wants to see."""
ALIGNMENT = 4096
"""Of tensors in the file: a page, so that they can be mapped into memory."""
SUFFIX = ".data"
HASH_LENGTH = 12
FOLDER_SETTING = "session.model_external_initializers_file_folder_path"
"""By which ONNX Runtime is told where the data of a model lie that it gets as bytes."""
STRING = 8
HALF_BYTES = (21, 22, 23)
"""ONNX's types of 4 bits: uint4, int4, float4e2m1."""


def save(model: Any, file: Path, *, folder: Path | None = None) -> tuple[Path, ...]:
    """Writes a model, and beside it its weights where they exceed LARGEST_BYTES: that file is returned.

    External data of `model` are read from `folder`. Each tensor leaves `model` as it is written, so that no
    second copy of all weights is held.
    """
    held = tensors_of(model.graph)
    if sum(size_bytes(tensor) for tensor in held) <= LARGEST_BYTES:
        load_(held, folder)
        companions: tuple[Path, ...] = ()
    else:
        companions = _move_out_(held, file, folder)
    file.write_bytes(model.SerializeToString(deterministic=True))
    return companions


def load_(tensors: list[Any], folder: Path | None, *, below: float = math.inf) -> None:
    """Brings external data of fewer bytes than `below` into their tensors."""
    from onnx import external_data_helper as external

    for tensor in tensors:
        if external.uses_external_data(tensor) and size_bytes(tensor) < below:
            external.load_external_data_for_tensor(tensor, str(folder))


def tensors_of(graph: Any) -> list[Any]:
    """Every tensor of a graph and of the graphs inside its nodes."""
    found = []
    for each in graphs_of(graph):
        found += list(each.initializer)
        for node in each.node:
            for attribute in node.attribute:
                found += ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
    return found


def graphs_of(graph: Any) -> list[Any]:
    """A graph and those in the attributes of its nodes."""
    return [graph, *(inner for node in graph.node for inner in inner_graphs(node))]


def inner_graphs(node: Any) -> list[Any]:
    """The graphs in the attributes of a node, and those inside them."""
    own = [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
    ]
    return [each for graph in own for each in graphs_of(graph)]


def size_bytes(tensor: Any) -> int:
    """What a tensor's shape and type say that its content takes; 0 for strings."""
    from onnx import helper

    if tensor.data_type == STRING:
        return 0
    count: int = math.prod(tensor.dims)
    if tensor.data_type in HALF_BYTES:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _move_out_(tensors: list[Any], file: Path, folder: Path | None) -> tuple[Path, ...]:
    """Writes the large tensors into a file of their own, and makes them point there."""
    large = [tensor for tensor in tensors if size_bytes(tensor) >= SMALLEST_BYTES]
    load_([tensor for tensor in tensors if size_bytes(tensor) < SMALLEST_BYTES], folder)
    if not large:
        return ()
    content, offset = hashlib.sha256(), 0
    scratch = file.with_name(f"{file.stem}{SUFFIX}.part")
    with scratch.open("wb") as writing:
        for tensor in large:
            load_([tensor], folder)
            gap, raw = bytes(-offset % ALIGNMENT), _raw(tensor)
            for part in (gap, raw):
                writing.write(part)
                content.update(part)
            offset += len(gap)
            _point_(tensor, offset=offset, length=len(raw))
            offset += len(raw)
    companion = file.with_name(f"{file.stem}-{content.hexdigest()[:HASH_LENGTH]}{SUFFIX}")
    scratch.replace(companion)
    for tensor in large:
        tensor.external_data.add(key="location", value=companion.name)
    return (companion,)


def _raw(tensor: Any) -> bytes:
    """A tensor's content as ONNX lays it out, whichever field holds it."""
    from onnx import numpy_helper

    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    raw: bytes = tensor.raw_data
    return raw


def _point_(tensor: Any, *, offset: int, length: int) -> None:
    """Takes the content out and says where it went, but for the file's name."""
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="offset", value=str(offset))
    tensor.external_data.add(key="length", value=str(length))
