"""The same function, written in the forms that ExecuTorch and XNNPACK take.

Each rewrite answers a trap seen in ExecuTorch 1.4.1 with torchao 0.18; its docstring says which.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from exporters.quiet import quiet

aten = torch.ops.aten
FxNode = Any
"""A torch.fx.Node: its arguments have no static types."""

MAX_UNROLLED_NODES = 5000
WITH_BIAS = {
    aten.linear.default: 2, aten.conv1d.default: 2, aten.conv2d.default: 2, aten.conv2d.padding: 2,
    aten.conv_transpose1d.default: 2, aten.conv_transpose2d.input: 2,
}  # fmt: skip
SCALAR_ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def prefer_delegated_forms(graph: GraphModule, *, safe_means: bool = False) -> GraphModule:
    """A copy of the graph after the rewrites below.

    `safe_means` keeps means over height and width out of the delegate, which an int8 program with a
    dynamic batch needs; otherwise they are brought into it.
    """
    graph = copied(graph)
    means = keep_means_outside_ if safe_means else keep_mean_dimensions_
    for rewrite in (unroll_loops_, means, own_biases_, integer_scalars_):
        rewrite(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def copied(graph: GraphModule) -> GraphModule:
    """A deep copy; the library's warnings about its own classes stay unsaid."""
    with quiet():
        return copy.deepcopy(graph)


def unroll_loops_(graph: GraphModule) -> None:
    """Writes scan and map over a fixed number of rows out, step by step.

    The runtime answers a scan of another batch than it was planned for with rows of the planned one, in
    silence, and neither quantizes nor delegates a body. Loops too long to write out stay.
    """
    for name, unroll in (("scan", _unrolled_scan), ("map_impl", _unrolled_map)):
        for node in list(graph.graph.nodes):
            if getattr(node.target, "__name__", str(node.target)) == name and _short(graph, node):
                _replace_results_(graph, node, unroll(graph, node))


def keep_mean_dimensions_(graph: GraphModule) -> None:
    """A mean over height and width goes into the delegate with keepdim alone: adds it, and a flatten."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.mean.dim):
        if (len(node.args) > 2 and node.args[2]) or not _spatial(node):
            continue
        with graph.graph.inserting_after(node):
            flat = graph.graph.call_function(aten.flatten.using_ints, (node, 1))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
        node.args = (node.args[0], [2, 3], True)
        node.meta = {**node.meta, "val": node.meta["val"][:, :, None, None]}


def keep_means_outside_(graph: GraphModule) -> None:
    """Writes a mean over height and width without keepdim, which XNNPACK leaves to the portable kernels.

    XNNPACK's mean behind an int8 or float16 convolution writes past its memory when a later call brings
    a larger batch: seen as SIGSEGV and "corrupted size vs. prev_size" with batches 1, then 16.
    """
    for node in list(graph.graph.nodes):
        if _is_pooling_mean(node):
            _mean_and_unsqueeze_(graph, node)


def _is_pooling_mean(node: FxNode) -> bool:
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]
    return node.target is aten.mean.dim and len(node.args) > 2 and node.args[2] and _spatial(node)


def _spatial(node: FxNode) -> bool:
    source = node.args[0].meta.get("val")
    return source is not None and source.dim() == 4 and sorted(a % 4 for a in node.args[1]) == [2, 3]


def _mean_and_unsqueeze_(graph: GraphModule, node: FxNode) -> None:
    value = node.meta["val"]
    with graph.graph.inserting_before(node):
        mean = _call(graph, aten.mean.dim, (node.args[0], [2, 3]), value[..., 0, 0])
        tall = _call(graph, aten.unsqueeze.default, (mean, -1), value[..., 0])
        whole = _call(graph, aten.unsqueeze.default, (tall, -1), value)
    for made in (mean, tall, whole):
        made.meta = {**node.meta, "val": made.meta["val"], "nn_module_stack": _of_no_class(node)}
    node.replace_all_uses_with(whole)
    graph.graph.erase_node(node)


def _of_no_class(node: FxNode) -> dict[str, tuple[str, str]]:
    """Where a node stands in the user's model, with the class of its module left out.

    XNNPACK's quantizer refuses every node of an nn.AdaptiveAvgPool2d that is no pooling operator.
    """
    stack = dict(node.meta.get("nn_module_stack") or {})
    if stack:
        innermost, (path, _) = list(stack.items())[-1]
        stack[innermost] = (path, "torch.nn.Module")
    return stack


def own_biases_(graph: GraphModule) -> None:
    """Gives every call of a shared layer a bias of its own.

    A static int8 bias is stored once, at the scale of one of the calls: the others answer wrongly.
    """
    seen: set[str] = set()
    for node in list(graph.graph.nodes):
        place = WITH_BIAS.get(node.target) if node.op == "call_function" else None
        bias = node.args[place] if place is not None and len(node.args) > place else None
        if not isinstance(bias, Node) or bias.op != "get_attr":
            continue
        if bias.target in seen:
            node.update_arg(place, _constant(graph, node, _attribute(graph, bias.target).clone()))
        seen.add(str(bias.target))


def integer_scalars_(graph: GraphModule) -> None:
    """Numbers added to integer tensors become integer tensors: the quantizer would make them floats."""
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if (
            node.target not in SCALAR_ARITHMETIC
            or not isinstance(value, Tensor)
            or value.dtype not in INTEGERS
        ):
            continue
        for place, argument in enumerate(node.args):
            if isinstance(argument, int) and not isinstance(argument, bool):
                node.update_arg(place, _constant(graph, node, torch.tensor(argument, dtype=value.dtype)))


def _short(graph: GraphModule, node: FxNode) -> bool:
    body = getattr(graph, str(node.args[0].target))
    rows = _rows(node)[0].meta["val"].shape[0]
    nodes = [inner for inner in body.graph.nodes if inner.op != "placeholder"]
    plain = all(inner.op in ("call_function", "output") for inner in nodes)
    return isinstance(rows, int) and plain and rows * len(nodes) <= MAX_UNROLLED_NODES


def _rows(node: FxNode) -> list[FxNode]:
    """What the loop goes over: the third argument of scan, the second of map."""
    return list(node.args[2] if len(node.args) == 4 else node.args[1])


def _unrolled_scan(graph: GraphModule, node: FxNode) -> list[FxNode]:
    body_node, init, _, extra = node.args
    carry, steps = list(init), []
    with graph.graph.inserting_before(node):
        for index in range(_rows(node)[0].meta["val"].shape[0]):
            results = _step(graph, body_node, [*carry, *_slices(graph, node, index), *extra])
            carry, outputs = results[: len(carry)], results[len(carry) :]
            steps.append(outputs)
        return [*carry, *_stacked(graph, steps)]


def _unrolled_map(graph: GraphModule, node: FxNode) -> list[FxNode]:
    body_node, _, extra = node.args
    with graph.graph.inserting_before(node):
        count = _rows(node)[0].meta["val"].shape[0]
        steps = [_step(graph, body_node, [*_slices(graph, node, index), *extra]) for index in range(count)]
        return _stacked(graph, steps)


def _slices(graph: GraphModule, node: FxNode, index: int) -> list[FxNode]:
    return [
        _call(graph, aten.select.int, (row, 0, index), row.meta["val"].select(0, index))
        for row in _rows(node)
    ]


def _step(graph: GraphModule, body_node: Any, arguments: list[Any]) -> list[Any]:
    """One run of the body, copied in; what it returns."""
    body = getattr(graph, body_node.target).graph
    known = dict(zip(body.find_nodes(op="placeholder"), arguments, strict=True))
    for inner in body.nodes:
        if inner.op == "call_function":
            known[inner] = graph.graph.node_copy(inner, known.__getitem__)
    return [known[result] for result in body.output_node().args[0]]


def _stacked(graph: GraphModule, steps: list[list[Any]]) -> list[FxNode]:
    return [
        _call(
            graph, aten.stack.default, (list(column), 0), torch.stack([each.meta["val"] for each in column])
        )
        for column in zip(*steps, strict=True)
    ]


def _call(graph: GraphModule, target: Any, arguments: tuple[Any, ...], value: Any) -> FxNode:
    made = graph.graph.call_function(target, arguments)
    made.meta["val"] = value
    return made


def _replace_results_(graph: GraphModule, node: FxNode, results: list[Any]) -> None:
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _constant(graph: GraphModule, user: FxNode, value: Tensor) -> FxNode:
    """A new buffer just before its user."""
    name = f"_constant_{sum(1 for _ in graph.named_buffers())}"
    graph.register_buffer(name, value.detach())
    with graph.graph.inserting_before(user):
        node = graph.graph.get_attr(name)
    mode = user.meta["val"].fake_mode
    node.meta = {"val": mode.from_tensor(value.detach()), "nn_module_stack": user.meta.get("nn_module_stack")}
    return node


def _attribute(graph: GraphModule, path: str) -> Tensor:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach()  # type: ignore[no-any-return]
