"""Which channels must go together: Torch-Pruning's dependency graph, read channel by channel.

Torch-Pruning (Fang et al. 2023, "DepGraph") traces the model and says how a channel of one layer maps
to channels of its neighbours. Here the mapping is followed for every channel and what it connects is
joined, so that a unit is exactly what disappears when one channel does. The library's own cutting
functions are not used: `layers.cut` cuts, and `proof` proves the result.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from deploy.pruning import layers
from deploy.pruning.forward import ForwardError, call_order, forward_outputs
from targets.errors import ModelError

IN, OUT, BOTH = "in", "out", "both"
OUTPUT_REASON = "its channels are an output of the model"
FIRST_REASON = "it reads the model's input"
EXCLUDED_REASON = "excluded by name"
PAD_REASON = "a constant pad fills some of its channels"
LOST_REASON = "the dependency graph cannot follow its channels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One side of a layer, or a parameter of no layer (then `side` is its dimension)."""

    path: str
    side: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Units that are alike: each can go, alone or with others, and costs the same.

    `units[i]` are the channels that go together by slot; `rates` says how many indices of a tensor's
    dimension one unit takes away, by (tensor's name, dimension).
    """

    name: str
    units: tuple[Mapping[Slot, tuple[int, ...]], ...]
    rates: Mapping[tuple[str, int], int]
    outputs: Mapping[str, int]  # layer's path -> output channels that one unit takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """The cells of a model, and the layers that stay as wide as they are with the reason."""

    cells: tuple[Cell, ...]
    spared: Mapping[str, str]


def find_channels(module: nn.Module, inputs: tuple[Tensor, ...], *, excluded: Sequence[str] = ()) -> Channels:
    """The removable units of a module that computes in floating point and is in evaluation mode.

    `excluded` are paths of layers whose output channels stay. Raises ModelError where tracing fails.
    """
    graph = _trace(module, inputs)
    walk = _Walk(graph)
    walk.follow_all()
    walk.tie_groups()
    paths = {part: path for path, part in module.named_modules()}
    _freeze(walk, module, inputs, dict.fromkeys(excluded, EXCLUDED_REASON), paths)
    return _collect(walk, paths)


def _trace(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import torch_pruning

    for parameter in module.parameters():  # autograd is what is traced: nothing may be frozen
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(module, inputs, forward_fn=_traced_outputs, verbose=False)
    except ForwardError as error:
        raise ModelError(
            f"the channels of {type(module).__name__} cannot be traced through {error.where}: {error}",
            expected="operations that autograd can follow",
            fix='set [prune] pattern = "none"',
        ) from error
    except Exception as error:
        raise ModelError(
            f"the channels of {type(module).__name__} cannot be traced: {error or type(error).__name__}",
            expected="layers of torch.nn connected by differentiable operations",
            fix='prune another part of the model, or set [prune] pattern = "none"',
        ) from error
    return graph


def _traced_outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = [tensor for tensor in forward_outputs(module, inputs) if tensor.grad_fn is not None]
    if not outputs:
        raise ValueError("no output depends on the parameters by differentiable operations")
    # The library takes a layer whose result is returned as it is for an inner one: one more operation
    # between them makes it see the output.
    return [tensor * 1 for tensor in outputs]


Key = tuple[int, str, int]  # a node's id, its side, a channel


class _Walk:
    """Union-find over channels, filled by following the dependency graph's edges."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes = {id(node): node for node in graph.module2node.values()}
        self.parent: dict[Key, Key] = {}
        self.reasons: dict[Key, str] = {}
        # No map leads beyond this, unless it runs in circles (the unrolled steps of a recurrent layer).
        self.most = sum(layers.width(part) for part in self._weighted()) + max(
            (size for parameter in graph.model.parameters() for size in parameter.shape), default=0
        )

    def find(self, key: Key) -> Key:
        """The representative of a channel's component; a channel never seen is its own."""
        passed = []
        self.parent.setdefault(key, key)
        while self.parent[key] != key:
            passed.append(key)
            key = self.parent[key]
        for one in passed:
            self.parent[one] = key
        return key

    def join(self, left: Key, right: Key) -> None:
        """These two channels go together."""
        first, second = self.find(left), self.find(right)
        if first != second:
            self.parent[second] = first

    def freeze(self, node: Any, reason: str, sides: tuple[str, ...] = (IN, OUT, BOTH)) -> None:
        """What the channels of a node belong to stays. The first reason is kept."""
        for key in [key for key in self.parent if key[0] == id(node) and key[1] in sides]:
            self.reasons.setdefault(key, reason)

    def follow_all(self) -> None:
        """Follows every output channel of every layer that makes channels."""
        seen: set[Key] = set()
        for node in self.nodes.values():
            if layers.is_weighted(node.module):
                side = self._side(node, self._pruner(node).prune_out_channels)
                self._follow(node, side, list(range(layers.width(node.module))), seen)

    def tie_groups(self) -> None:
        """Grouped convolutions and norms stay regular: see `layers.cuts_whole_groups`."""
        for node in self.nodes.values():
            part = node.module
            if isinstance(part, nn.GroupNorm):
                self._tie_blocks(node, BOTH, part.num_channels // part.num_groups, part.num_channels)
            elif isinstance(part, _ConvNd) and part.groups > 1 and not self.is_depthwise(node):
                self._tie_conv(node, part)

    def is_depthwise(self, node: Any) -> bool:
        """Whether the graph takes the layer's input and output channels as the same ones."""
        pruner = self._pruner(node)
        return bool(pruner.prune_in_channels == pruner.prune_out_channels)

    def _tie_conv(self, node: Any, conv: _ConvNd) -> None:
        per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        if layers.cuts_whole_groups(conv):
            self._tie_blocks(node, IN, per_in, conv.in_channels)
            self._tie_blocks(node, OUT, per_out, conv.out_channels)
            for group in range(conv.groups):
                self.join((id(node), IN, group * per_in), (id(node), OUT, group * per_out))
            return
        for side, per_group in ((IN, per_in), (OUT, per_out)):
            for group in range(1, conv.groups):
                for position in range(per_group):
                    self.join((id(node), side, position), (id(node), side, group * per_group + position))

    def _tie_blocks(self, node: Any, side: str, block: int, channels: int) -> None:
        for channel in range(channels):
            self.join((id(node), side, channel - channel % block), (id(node), side, channel))

    def _follow(self, node: Any, side: str, channels: list[int], seen: set[Key]) -> None:
        work = [(node, side, channels)]
        while work:
            node, side, channels = work.pop()
            fresh = [channel for channel in channels if (id(node), side, channel) not in seen]
            seen.update((id(node), side, channel) for channel in fresh)
            for edge in node.dependencies if fresh else ():
                if self._side(node, edge.trigger) == side:
                    work.append(self._cross(edge, node, side, fresh))

    def _cross(self, edge: Any, node: Any, side: str, channels: list[int]) -> tuple[Any, str, list[int]]:
        """Joins the channels at the two ends of an edge; returns those at the far end."""
        from torch_pruning._helpers import _HybridIndex

        other = self._side(edge.target, edge.handler)
        pairs = [_HybridIndex(idx=channel, root_idx=channel) for channel in channels]
        try:
            for mapping in edge.index_mapping:
                pairs = mapping(pairs) if mapping is not None else pairs
        except IndexError:  # the library met a split or a reshape that its maps do not fit
            for channel in channels:
                self.reasons.setdefault((id(node), side, channel), LOST_REASON)
            return edge.target, other, []
        for pair in pairs:
            if pair.root_idx is None:  # the library's map for grouped-query attention forgets the source
                self.reasons.setdefault((id(edge.target), other, pair.idx), "attention heads share it")
        links = [(pair.root_idx, pair.idx) for pair in pairs if pair.root_idx is not None]
        links = self._pad(edge, node, side, links)
        for source, target in links:
            if not 0 <= target < self.most:
                self.reasons.setdefault((id(node), side, source), LOST_REASON)
        links = [(source, target) for source, target in links if 0 <= target < self.most]
        for source, target in links:
            self.join((id(node), side, source), (id(edge.target), other, target))
        return edge.target, other, list(dict.fromkeys(target for _, target in links))

    def _pad(self, edge: Any, node: Any, side: str, links: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Shifts channels across a constant pad of the channel dimension, which the library ignores.

        A pad's node counts channels as its output does. Those that the pad itself fills cannot go.
        """
        padding = _channel_padding(edge.target) if node in edge.target.inputs else None
        if padding is not None:
            return [(source, target + padding.before) for source, target in links]
        padding = _channel_padding(node) if edge.target in node.inputs else None
        if padding is None:
            return links
        inner = range(padding.before, padding.before + padding.channels)
        for source, _ in links:
            if source not in inner:
                self.reasons.setdefault((id(node), side, source), PAD_REASON)
        return [(source, target - padding.before) for source, target in links if source in inner]

    def _weighted(self) -> list[nn.Module]:
        return [node.module for node in self.nodes.values() if layers.is_weighted(node.module)]

    def _side(self, node: Any, function: Callable[..., Any]) -> str:
        pruner = self._pruner(node)
        if pruner.prune_in_channels == pruner.prune_out_channels:
            return BOTH
        return OUT if function == pruner.prune_out_channels else IN

    def _pruner(self, node: Any) -> Any:
        return self.graph.get_pruner_of_module(node.module)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Padding:
    before: int
    channels: int


def _channel_padding(node: Any) -> _Padding | None:
    function = node.grad_fn
    if isinstance(node.module, nn.Parameter) or function is None or "ConstantPadNd" not in function.name():
        return None
    shape = function._input_metadata[0].shape  # of the pad's output
    place = 2 * (len(shape) - 2)  # pads are listed from the last dimension on; channels are dimension 1
    if place < 0 or len(function._saved_pad) < place + 2:
        return None
    before, after = function._saved_pad[place : place + 2]
    return _Padding(before=before, channels=shape[1] - before - after)


def _freeze(
    walk: _Walk,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    excluded: Mapping[str, str],
    paths: Mapping[nn.Module, str],
) -> None:
    order = call_order(module, inputs, (_ConvNd, nn.Linear, nn.Embedding))
    first = {part for place, (part, direct) in enumerate(order) if place == 0 or direct}
    tied = _tied(module)
    for node in walk.nodes.values():
        part = node.module
        path = paths.get(part, "") if not isinstance(part, nn.Parameter) else ""
        if type(part).__name__ == "_OutputOp":
            walk.freeze(node, OUTPUT_REASON)
        elif part in first:
            walk.freeze(node, FIRST_REASON, (OUT, BOTH))
        if path in excluded and path:
            walk.freeze(node, excluded[path], (OUT, BOTH))
        if path and (reason := _cannot_cut(part, tied)):
            walk.freeze(node, reason)


def _cannot_cut(part: nn.Module, tied: set[int]) -> str | None:
    """Why a layer that is met on the way cannot lose channels."""
    if not layers.is_supported(part):
        return f"{type(part).__name__} mixes or fixes its channels" if list(part.parameters()) else None
    if any(id(parameter) in tied for parameter in part.parameters()):
        return "its weight is tied to another layer's"
    if part._parameters.get("weight") is None and layers.is_weighted(part):
        return "its weight is computed from other parameters"
    if isinstance(part, _ConvNd) and part.groups == part.out_channels != part.in_channels:
        return "its groups have several inputs and one output"
    return None


def _tied(module: nn.Module) -> set[int]:
    counts: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def _collect(walk: _Walk, paths: Mapping[nn.Module, str]) -> Channels:
    parameters = walk.graph._param_to_name
    components: dict[Key, dict[Slot, list[int]]] = {}
    stays: dict[Key, tuple[str, str]] = {}
    for key in list(walk.parent):
        root = walk.find(key)
        node = walk.nodes[key[0]]
        if key in walk.reasons:
            where = "" if isinstance(node.module, nn.Parameter) else paths.get(node.module, "")
            stays.setdefault(root, (where, walk.reasons[key]))
        if isinstance(node.module, nn.Parameter):
            slot = Slot(path=parameters[node.module], side=str(node.pruning_dim % node.module.dim()))
        elif node.module in paths:
            slot = Slot(path=paths[node.module], side=key[1])
        else:
            continue  # an operation without weights
        components.setdefault(root, {}).setdefault(slot, []).append(key[2])
    modules = {path: part for part, path in paths.items()}
    return _cells(components, stays, modules)


def _cells(
    components: Mapping[Key, Mapping[Slot, list[int]]],
    stays: Mapping[Key, tuple[str, str]],
    modules: Mapping[str, nn.Module],
) -> Channels:
    alike: dict[tuple[Any, ...], list[Mapping[Slot, tuple[int, ...]]]] = {}
    spared: dict[str, str] = {}
    for root, slots in components.items():
        unit = {slot: tuple(sorted(indices)) for slot, indices in slots.items()}
        outputs = _outputs(unit, modules)
        rates = _rates(unit, modules) if root not in stays else None
        if rates is None:
            where, reason = stays.get(root, ("", "its channels do not leave a regular layer"))
            for path in outputs:
                spared.setdefault(path, reason if where in ("", path) else f"goes with {where}: {reason}")
        elif outputs:
            signature = (tuple(sorted(rates.items())), tuple(sorted(outputs.items())))
            alike.setdefault(signature, []).append(unit)
    cells = tuple(
        Cell(name=min(outputs)[0], units=tuple(units), rates=dict(rates), outputs=dict(outputs))
        for (rates, outputs), units in alike.items()
    )
    return Channels(cells=cells, spared=spared)


def _rates(
    unit: Mapping[Slot, tuple[int, ...]], modules: Mapping[str, nn.Module]
) -> dict[tuple[str, int], int] | None:
    """Indices that one unit takes from each (tensor, dimension); None for an irregular layer."""
    try:
        removed, _ = removed_indices([unit], modules)
    except ValueError:
        return None
    return {key: len(indices) for key, indices in removed.items()}


def removed_indices(
    units: Sequence[Mapping[Slot, tuple[int, ...]]], modules: Mapping[str, nn.Module]
) -> tuple[dict[tuple[str, int], tuple[int, ...]], dict[str, dict[str, int]]]:
    """What removing these units takes from each (tensor, dimension), and the attributes afterwards.

    Raises ValueError where a grouped layer would become irregular.
    """
    sides: dict[str, dict[str, set[int]]] = {}
    for unit in units:
        for slot, indices in unit.items():
            sides.setdefault(slot.path, {}).setdefault(slot.side, set()).update(indices)
    removed: dict[tuple[str, int], tuple[int, ...]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for path, by_side in sides.items():
        if path not in modules:  # a parameter of no layer
            removed.update({(path, int(side)): tuple(sorted(indices)) for side, indices in by_side.items()})
            continue
        both = by_side.get(BOTH, set())
        cut = layers.cut(modules[path], by_side.get(IN, set()) | both, by_side.get(OUT, set()) | both)
        removed.update({(f"{path}.{name}", dim): indices for (name, dim), indices in cut.removed.items()})
        attributes[path] = cut.attributes
    return removed, attributes


def _outputs(unit: Mapping[Slot, tuple[int, ...]], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    return {
        slot.path: len(indices)
        for slot, indices in unit.items()
        if slot.side in (OUT, BOTH) and slot.path in modules and layers.is_weighted(modules[slot.path])
    }
