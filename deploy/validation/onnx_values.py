"""What the nodes of an ONNX model compute when nothing is optimised, and which of them went wrong first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.external_data import inner_graphs
from exporters.onnx import OnnxModel, add_outputs_

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]

DROWNING = 1e4
"""So many times larger a number hides differences below 80 dB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A value that depends on the inputs: its node's operator and module, and the values made from it."""

    name: str
    module: str
    operator: str
    readers: tuple[str, ...]


def inner_values(model: OnnxModel) -> list[Inner]:
    """The values of a model in the order in which they are computed, outputs among them."""
    graph = _load(model.file).graph
    moving = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[str]] = {}
    nodes = []
    for node in graph.node:
        read = {name for name in _reads(node) if name in moving}
        if read:
            moving |= {*node.output}
            nodes.append(node)
        for name in read:
            readers.setdefault(name, []).extend(node.output)
    return [
        Inner(
            name=name,
            module=model.modules.get(node.name, ""),
            operator=node.op_type,
            readers=tuple(readers.get(name, ())),
        )
        for node in nodes
        for name in filter(None, node.output)
    ]


def run_unoptimised(
    model: OnnxModel, names: Sequence[str], batches: Sequence[Inputs]
) -> list[dict[str, Array]]:
    """The outputs and the named values for each batch, by name."""
    from exporters.onnxruntime import unoptimised_session

    proto = _load(model.file)
    add_outputs_(proto, names)
    session = unoptimised_session(proto, model.file.parent)
    outputs = [output.name for output in session.get_outputs()]
    inputs = [spec.name for spec in model.inputs]
    return [
        dict(zip(outputs, session.run(None, {name: batch[name] for name in inputs}), strict=True))
        for batch in batches
    ]


def first_wrong(values: Sequence[Inner], right: Mapping[str, bool]) -> Inner | None:
    """The first value that is wrong, by what was found of those that could be compared."""
    return next((value for value in values if not right.get(value.name, True)), None)


def forgiven(values: Sequence[Inner], right: Mapping[str, bool]) -> dict[str, bool]:
    """What was found, but for values from which their own module makes a right one.

    ONNX writes many an operator as several, whose values in between have no like in the user's graph.
    """
    modules = {value.name: value.module for value in values}
    sound: dict[str, bool] = {}
    for value in reversed(values):
        own = [name for name in value.readers if modules.get(name) == value.module]
        if value.name in right:
            sound[value.name] = right[value.name] or any(sound.get(name, False) for name in own)
    return sound


def telling(one: Array, other: Array) -> tuple[Array, Array]:
    """Two arrays of one size without the equal numbers that drown all that differ, such as a mask's -1e9."""
    one, other = one.ravel(), other.ravel()
    apart = one != other
    largest = float(np.abs(one[apart]).max(initial=0.0))
    kept = apart | (np.abs(one) <= DROWNING * largest)
    return one[kept], other[kept]


def in_chunks(values: Sequence[Inner], size: int) -> Iterator[list[str]]:
    """The names, so many at a time: all values of a large model at once would fill the memory."""
    for start in range(0, len(values), size):
        yield [value.name for value in values[start : start + size]]


def _load(file: Path) -> Any:
    import onnx

    return onnx.load(str(file), load_external_data=False)


def _reads(node: Any) -> set[str]:
    """What a node reads, in the graphs inside it too."""
    inner = {name for graph in inner_graphs(node) for each in graph.node for name in each.input}
    return {*node.input, *inner}
