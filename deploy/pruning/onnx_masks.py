"""Weight masks of an ONNX model: what masks.py does for modules, on constant weights of graph nodes."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deploy.pruning.masks import LayerMask, rank
from targets.errors import UsageError, nearest

FLOAT = 1
"""ONNX's type of float32."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def magnitude_masks_(graph: Any, *, sparsity: float, ranking: str, exclude: Sequence[str]) -> list[LayerMask]:
    """Sets those weights of a graph's inner convolutions and products to zero that are nearest to it.

    Changes the graph in place and gives the masks. Raises UsageError as `rank`, and for a pattern of
    `exclude` that names no node.
    """
    import onnx

    nodes = prunable(graph, exclude)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    values = {node.name: onnx.numpy_helper.to_array(tensors[node.input[1]]) for node in nodes}
    scores = {name: torch.from_numpy(np.abs(value)) for name, value in values.items()}
    kept = rank(scores, sparsity, ranking)
    for node in nodes:
        mask = kept[node.name].numpy()
        thinned = onnx.numpy_helper.from_array(values[node.name] * mask, node.input[1])
        tensors[node.input[1]].CopyFrom(thinned)
    return [LayerMask(layer=node.name, kind=node.op_type, kept=kept[node.name]) for node in nodes]


def prunable(graph: Any, exclude: Sequence[str]) -> list[Any]:
    """The nodes whose constant weights a mask may thin, as `masks.prunable` chooses layers."""
    names = [node.name for node in graph.node]
    excluded: set[str] = set()
    for pattern in exclude:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UsageError(
                "an exclude pattern matches no node",
                found=pattern,
                expected=f"a node's name, like {', '.join(nearest(pattern, names))}",
                fix="correct the pattern, or remove it",
            )
        excluded.update(found)
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    nodes: list[Any] = []
    seen: set[str] = set()
    for node in graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in weights - seen:
            seen.add(node.input[1])
            nodes.append(node)
    return [node for node in nodes[1:-1] if not _grouped(node) and node.name not in excluded]


def _grouped(node: Any) -> bool:
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
