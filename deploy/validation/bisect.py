"""Where outputs went wrong: the first stage between module and artifact, and the first module in it.

A rung passes four stages: `export` (torch.export of the module), `fold` (batch-norms folded and the
graph written in the delegate's forms), `quantize` (the precision of the rung) and `lower` (the artifact
in its runtime). Each stage's outputs are compared with those of the stage before it, on the inputs that
showed the mismatch. Within the first stage that differs, values at the ends of modules are compared.

Runtimes that start from ONNX have `convert` (the ONNX model, not optimised) and `artifact` (quantized, in its
runtime) behind `fold`; a foreign ONNX model has the last alone. There, the values of nodes are compared.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from calibration import compare
from calibration.dataset import Dataset
from deploy.validation import onnx_values
from exporters.base import Delegated, Quantization, find_exporter
from exporters.capture import Captured, call_module, capture, flatten_outputs, trace
from exporters.onnx import OnnxModel
from exporters.quiet import quiet
from exporters.remote import RemoteSession
from targets.errors import DeployError, first_line

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
Answers = list[list[Array]]
Scope = tuple[str, int]
Key = tuple[Scope, str, int]

EXACT_SNR_DB = 80.0
SAMPLES = 32
LOCAL_BATCHES = 4
MAX_TAPS = 200
FUSED_BEHIND = ("relu", "relu6", "hardtanh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A rung whose outputs are wrong, and what made it.

    `sizes` are the batch sizes that were compared; `least_snr_db` is what the rung's precision must
    reach; `inputs` and `outputs` name the artifact's, in its order. `onnx` is the model that the artifact was
    made from, where that was ONNX; `traceable` is False where the module itself stands for it.
    """

    module: nn.Module
    data: Dataset
    sizes: Sequence[int]
    runtime: str
    precision: str
    least_snr_db: float
    artifact: Path
    inputs: Sequence[str]
    outputs: Sequence[str]
    output_names: Sequence[str]
    calibration: Sequence[Inputs]
    quantization: Quantization
    threads: int
    onnx: OnnxModel | None = None
    traceable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A module of the user's model by its path ("" is the model's own forward), or why there is none."""

    module: str | None
    call: int = 0
    operator: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        if self.module is None:
            return f"no single module ({self.note})"
        again = f", call {self.call + 1}" if self.call else ""
        operator = f" ({self.operator})" if self.operator else ""
        return f"{self.module or 'the forward of the model itself'}{again}{operator}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first stage whose outputs differ from those of the stage before, and the first module in it.

    `snr_db` is the stage's own, -inf for NaN. `alone` is False when every stage passes by itself and
    this one loses most.
    """

    stage: str
    place: Place
    snr_db: float
    threshold_db: float
    alone: bool = True

    @property
    def sentence(self) -> str:
        """The finding for a person."""
        measured = f"{self.snr_db:.1f} dB" if math.isfinite(self.snr_db) else "NaN or infinite outputs"
        how = "the first stage to differ is" if self.alone else "no stage fails alone, most is lost in"
        return f"{how} {self.stage} ({measured}, {self.threshold_db:g} dB asked), first in {self.place}"


@runtime_checkable
class StagedExporter(Protocol):
    """An exporter that shows the graphs between the captured module and its file."""

    suffix: str

    def rewritten(self, captured: Captured, precision: str) -> GraphModule:
        """The float graph as it will be quantized and lowered."""
        ...

    def quantized(
        self,
        captured: Captured,
        graph: GraphModule,
        precision: str,
        *,
        calibration: Sequence[Inputs],
        quantization: Quantization,
    ) -> nn.Module:
        """The rewritten graph in a precision."""
        ...

    def write(self, program: torch.export.ExportedProgram, precision: str, file: Path) -> Delegated:
        """Lowers a program into a file."""
        ...


@runtime_checkable
class TappedExporter(Protocol):
    """An exporter whose artifacts can be made to answer values inside them."""

    suffix: str

    def tapped(self, artifact: Path, names: Sequence[str], file: Path) -> dict[str, str]:
        """Writes a copy of an artifact that answers these ONNX values too; returns their names there."""
        ...


class UnclearError(Exception):
    """The mismatch cannot be pinned to a stage; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: its outputs for batches, and the search for its first wrong module."""

    name: str
    least_snr_db: float
    answers: Callable[[Sequence[Inputs]], Answers]
    locate: Callable[[Sequence[Inputs]], Place]


def explain(case: Case) -> str:
    """Where the mismatch begins, in a sentence. Never raises: a failed search must not hide the mismatch."""
    try:
        return bisect(case).sentence
    except DeployError as error:
        reason = error.message.rstrip(".")
    except Exception as error:  # whatever broke the build may break the search as well
        reason = str(error) if isinstance(error, UnclearError) else first_line(error)
    return f"the stage could not be narrowed down: {reason}"


def bisect(case: Case) -> Finding:
    """The first stage and module that differ. Raises UnclearError when nothing differs on repetition."""
    with quiet(), torch.no_grad():
        batches = list(_batches(case))
        start = _module_answers(case, batches)
        before = start
        passed: list[tuple[Stage, float]] = []
        for stage in _stages(case):
            after = stage.answers(batches)
            snr = _snr_db(before, after)
            if snr < stage.least_snr_db or _stands_still(before, after):
                place = _located(stage, _worst(batches, before, after))
                return Finding(stage=stage.name, place=place, snr_db=snr, threshold_db=stage.least_snr_db)
            passed.append((stage, snr))
            before = after
        if not _differs(start, before, case.least_snr_db):
            raise UnclearError("repeated, the outputs agree: the runtime's answers vary")
    stage, snr = min(passed, key=lambda each: each[1])
    place = Place(module=None, note="every module stays within the stage's tolerance")
    return Finding(stage=stage.name, place=place, snr_db=snr, threshold_db=stage.least_snr_db, alone=False)


def _located(stage: Stage, batches: Sequence[Inputs]) -> Place:
    """The place within a stage; the stage stays named when the search for the module fails."""
    try:
        return stage.locate(batches)
    except DeployError as error:
        return Place(module=None, note=error.message.rstrip("."))
    except Exception as error:  # a tapped program may fail where the whole one does not
        return Place(module=None, note=first_line(error))


def _stages(case: Case) -> Iterator[Stage]:
    """The stages in order, each made only when the one before it was right."""
    exporter = find_exporter(case.runtime)
    if case.onnx is not None and isinstance(exporter, TappedExporter):
        yield from _onnx_stages(case, case.onnx, exporter)
    elif isinstance(exporter, StagedExporter):
        yield from _graph_stages(case, exporter)
    else:
        raise UnclearError(f"the {case.runtime} exporter shows no graph between module and artifact")


def _export_stage(case: Case, traced: Captured, exact: float) -> Stage:
    return Stage(
        name="export",
        least_snr_db=exact,
        answers=_answers_of(traced.graph, traced),
        locate=lambda batches: _first_wrong_module(case, traced, batches[0], exact),
    )


def _fold_stage(traced: Captured, graph: GraphModule, exact: float) -> Stage:
    return Stage(
        name="fold",
        least_snr_db=exact,
        answers=_answers_of(graph, traced),
        locate=lambda batches: _first_wrong_node(traced, traced.graph, graph, batches, exact),
    )


def _answers_of(graph: GraphModule, captured: Captured) -> Callable[[Sequence[Inputs]], Answers]:
    return lambda batches: [_run(graph, captured, batch)[0] for batch in batches]


def _exact(case: Case) -> float:
    return case.least_snr_db if case.precision == "float32" else EXACT_SNR_DB


def _onnx_stages(case: Case, model: OnnxModel, exporter: TappedExporter) -> Iterator[Stage]:
    if case.traceable:
        exact = _exact(case)
        traced = trace(case.module, case.data.specs, output_names=case.output_names)
        yield _export_stage(case, traced, exact)
        captured = capture(case.module, case.data.specs, output_names=case.output_names)
        yield _fold_stage(traced, captured.graph, exact)
        yield Stage(
            name="convert",
            least_snr_db=exact,
            answers=lambda batches: _onnx_answers(case, model, batches),
            locate=lambda batches: _first_wrong_conversion(case, captured, model, batches[0], exact),
        )
    yield Stage(
        name="artifact",
        least_snr_db=case.least_snr_db,
        answers=lambda batches: _runtime_answers(case, case.artifact, case.outputs, batches),
        locate=lambda batches: _first_wrong_inside(case, model, exporter, batches),
    )


def _onnx_answers(case: Case, model: OnnxModel, batches: Sequence[Inputs]) -> Answers:
    found = onnx_values.run_unoptimised(model, (), batches)
    return [[answer[name] for name in case.outputs] for answer in found]


def _first_wrong_conversion(
    case: Case, captured: Captured, model: OnnxModel, batch: Inputs, least: float
) -> Place:
    """The first value of the ONNX model that no operator of the same module computes in the graph."""
    graph = captured.graph
    _, computed = _run(graph, captured, batch, set(graph.graph.nodes))
    known: dict[str, list[Array]] = {}
    for node, value in computed.items():
        scopes = _scopes(node)
        known.setdefault(scopes[-1][0] if scopes else "", []).append(value)
    values, right = onnx_values.inner_values(model), dict[str, bool]()
    modules = {value.name: value.module for value in values}
    for names in onnx_values.in_chunks(values, MAX_TAPS):
        (found,) = onnx_values.run_unoptimised(model, names, [batch])
        for name in names:
            if found[name].dtype.kind == "f":
                near = known.get(modules[name]) or list(computed.values())
                right[name] = any(_is_near(value, found[name], least) for value in near)
    wrong = onnx_values.first_wrong(values, onnx_values.forgiven(values, right))
    return _place_of(wrong, "every value of the ONNX model is in the graph")


def _first_wrong_inside(
    case: Case, model: OnnxModel, exporter: TappedExporter, batches: Sequence[Inputs]
) -> Place:
    """The first value inside the artifact that is not what the ONNX model computes."""
    values, right = onnx_values.inner_values(model), dict[str, bool]()
    for names in onnx_values.in_chunks(values, MAX_TAPS):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"bisect{exporter.suffix}"
            tapped = exporter.tapped(case.artifact, names, file)
            candidate = _runtime_answers(case, file, [*case.outputs, *tapped.values()], batches)
        found = [*case.outputs, *tapped]
        reference = onnx_values.run_unoptimised(model, found, batches)
        for index, name in enumerate(found):
            pairs = [(r[name], c[index]) for r, c in zip(reference, candidate, strict=True)]
            if all(array.dtype.kind == "f" for pair in pairs for array in pair):
                near = all(_is_near(one, other, case.least_snr_db) for one, other in pairs)
                right[name] = right.get(name, True) and near
    return _place_of(
        onnx_values.first_wrong(values, right), "it is right as soon as values inside are looked at"
    )


def _is_near(one: Array, other: Array, least: float) -> bool:
    if one.size != other.size:
        return False
    apart = onnx_values.telling(one, other)
    return not apart[0].size or _snr_db([[apart[0]]], [[apart[1]]]) >= least


def _place_of(value: onnx_values.Inner | None, otherwise: str) -> Place:
    if value is None:
        return Place(module=None, note=otherwise)
    return Place(module=value.module, operator=value.operator)


def _graph_stages(case: Case, exporter: StagedExporter) -> Iterator[Stage]:
    exact = _exact(case)
    traced = trace(case.module, case.data.specs, output_names=case.output_names)
    yield _export_stage(case, traced, exact)
    captured = capture(case.module, case.data.specs, output_names=case.output_names)
    graph = exporter.rewritten(captured, case.precision)
    yield _fold_stage(traced, graph, exact)
    final = graph
    if case.precision != "float32":
        quantized = exporter.quantized(
            captured, graph, case.precision, calibration=case.calibration, quantization=case.quantization
        )
        final = captured.program(quantized).module()  # type: ignore[arg-type]
        yield Stage(
            name="quantize",
            least_snr_db=case.least_snr_db,
            answers=_answers_of(final, traced),
            locate=lambda batches: _first_wrong_node(captured, graph, final, batches, case.least_snr_db),
        )
    yield Stage(
        name="lower",
        least_snr_db=case.least_snr_db,
        answers=lambda batches: _runtime_answers(case, case.artifact, case.outputs, batches),
        locate=lambda batches: _first_wrong_tap(case, exporter, captured, final, batches),
    )


def _batches(case: Case) -> Iterator[dict[str, Array]]:
    """The compared batches: every size over the first samples, which repeat where there are too few."""
    count = min(len(case.data), max(SAMPLES, *case.sizes))
    for size in case.sizes:
        for start in range(0, max(1, min(count, SAMPLES) // size) * size, size):
            yield case.data.select((start + np.arange(size)) % count).batch(0, size)


def _module_answers(case: Case, batches: Sequence[Inputs]) -> Answers:
    return [
        [_array(leaf) for leaf in flatten_outputs(call_module(case.module, case.data.specs, _tensors(batch)))]
        for batch in batches
    ]


def _runtime_answers(case: Case, file: Path, outputs: Sequence[str], batches: Sequence[Inputs]) -> Answers:
    """What the runtime answers, in a process of its own."""
    specs = {spec.name: spec for spec in case.data.specs}
    with RemoteSession(
        case.runtime,
        file,
        inputs=[specs[name] for name in case.inputs],
        outputs=outputs,
        threads=case.threads,
    ) as session:
        answers = [session.run(batch) for batch in batches]
    return [[answer[name] for name in outputs] for answer in answers]


class _Observer(Interpreter):
    """Runs a graph and hands each node's value on."""

    def __init__(self, graph: GraphModule, see: Callable[[Node, Any], None]) -> None:
        super().__init__(graph)
        self._see = see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self._see(n, value)
        return value


def _run(
    graph: GraphModule, captured: Captured, batch: Inputs, watched: Collection[Node] = ()
) -> tuple[list[Array], dict[Node, Array]]:
    """A graph's outputs, and the values of the watched nodes that are floating-point tensors."""
    seen: dict[Node, Array] = {}

    def see(node: Node, value: Any) -> None:
        if node in watched and isinstance(value, Tensor) and value.is_floating_point():
            seen[node] = _array(value)

    flat = [_tensors(batch)[spec.name] for spec in captured.inputs]
    outputs = _Observer(graph, see).run(*flat, enable_io_processing=False)
    return [_array(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)], seen


def _first_wrong_module(case: Case, traced: Captured, batch: Inputs, least: float) -> Place:
    """The first module, in the order in which calls end, whose outputs no node of its scope computes."""
    nodes = [node for node in traced.graph.graph.nodes if _scopes(node)]
    _, values = _run(traced.graph, traced, batch, set(nodes))
    inside: dict[Scope, list[Array]] = {}
    for node, value in values.items():
        for scope in _scopes(node):
            inside.setdefault(scope, []).append(value)
    for scope, outputs in _module_calls(case, batch):
        known = inside.get(scope)
        if known and not all(_appears(output, known, least) for output in outputs):
            return Place(module=scope[0], call=scope[1])
    return Place(module=None, note="every module's outputs appear in the graph")


def _module_calls(case: Case, batch: Inputs) -> list[tuple[Scope, list[Array]]]:
    """Each call of each submodule with copies of its outputs, in the order in which the calls end."""
    calls: list[tuple[Scope, list[Array]]] = []
    counts: dict[str, int] = {}

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> None:
            call = counts[path] = counts.get(path, -1) + 1
            leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
            calls.append(((path, call), [_array(leaf) for leaf in leaves if leaf.is_floating_point()]))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in case.module.named_modules()]
    try:
        call_module(case.module, case.data.specs, _tensors(batch))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _appears(output: Array, known: Sequence[Array], least: float) -> bool:
    return any(_snr_db([[output]], [[value]]) >= least for value in known if value.size == output.size)


def _first_wrong_node(
    captured: Captured, before: GraphModule, after: GraphModule, batches: Sequence[Inputs], least: float
) -> Place:
    """The first end of a module at which two graphs of the same model part."""
    twins = _twins(before, after)
    settled = {node: _settled(node) for node in twins}
    old = [_run(before, captured, batch, set(twins.values()))[1] for batch in batches]
    new = [_run(after, captured, batch, set(settled.values()))[1] for batch in batches]
    for node, twin in twins.items():
        if any(twin not in one or settled[node] not in other for one, other in zip(old, new, strict=True)):
            continue
        reference, candidate = [[one[twin]] for one in old], [[other[settled[node]]] for other in new]
        if _differs(reference, candidate, least):
            return _place(node)
    return Place(module=None, note="the modules that both graphs hold agree")


def _twins(before: GraphModule, after: GraphModule) -> dict[Node, Node]:
    """Nodes of `after` at the ends of modules, with the node of `before` that computes the same.

    A batch-norm that was folded away stands behind the convolution that took it in.
    """
    old, new = _keys(before), {key: node for node, key in _keys(after).items()}
    twins: dict[Node, Node] = {}
    for node in _ends(old):
        producer = node.args[0] if node.args else None
        if old[node] in new:
            twins[new[old[node]]] = node
        elif "batch_norm" in _operator(node) and isinstance(producer, Node) and old.get(producer) in new:
            twins[new[old[producer]]] = node
    return twins


def _keys(graph: GraphModule) -> dict[Node, Key]:
    """The model's own operators: the module call they stand in, their name, and which of these they are."""
    counts: dict[tuple[Scope, str], int] = {}
    keys: dict[Node, Key] = {}
    for node in graph.graph.nodes:
        scopes = _scopes(node)
        if node.op != "call_function" or not scopes or "quantize" in _operator(node):
            continue
        own = (scopes[-1], _operator(node))
        keys[node] = (*own, counts.get(own, 0))
        counts[own] = counts.get(own, 0) + 1
    return keys


def _ends(keys: Mapping[Node, Key]) -> list[Node]:
    """The last operator of every stretch that runs within one module call."""
    nodes = list(keys)
    return [
        node
        for node, following in zip(nodes, [*nodes[1:], None], strict=True)
        if following is None or keys[following][0] != keys[node][0]
    ]


def _scopes(node: Node) -> list[Scope]:
    """The module calls around a node, outermost first, as torch.export writes them: "@1" marks a second."""
    scopes = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, _, call = str(key).rpartition("@")
        scopes.append((str(path).partition("@")[0], int(call) if call.isdigit() else 0))
    return scopes


def _operator(node: Node) -> str:
    return str(node.target)


def _place(node: Node) -> Place:
    path, call = _scopes(node)[-1]
    return Place(module=path, call=call, operator=_operator(node))


def _settled(node: Node) -> Node:
    """The node itself, or its value after it was quantized: what the following operators read."""
    for user in node.users:
        if _quantizes(user):
            for reader in user.users:
                if "dequantize" in _operator(reader):
                    return reader
    return node


def _quantizes(node: Node) -> bool:
    return "quantize" in _operator(node) and "dequantize" not in _operator(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A node to look at, the operator it stands for, and what its integers call zero."""

    node: Node
    operator: Node
    zero_point: int = 0


class _Tapped(nn.Module):
    """A graph whose outputs are followed by the values of some of its nodes."""

    def __init__(self, graph: GraphModule, nodes: Sequence[Node]) -> None:
        super().__init__()
        self.inner = graph
        self._nodes = tuple(nodes)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The graph's flat outputs, then the tapped values."""
        values: dict[Node, Any] = {}
        flat = _Observer(self.inner, values.__setitem__).run(*tensors, enable_io_processing=False)
        outputs = [leaf for leaf in pytree.tree_leaves(flat) if isinstance(leaf, Tensor)]
        return (*outputs, *(values[node] for node in self._nodes))


def _first_wrong_tap(
    case: Case, exporter: StagedExporter, captured: Captured, graph: GraphModule, batches: Sequence[Inputs]
) -> Place:
    """Lowers the graph again with a look at the ends of its modules, and compares those in the runtime."""
    taps = _taps(graph)
    by_position = replace(
        captured,
        arguments=(tuple(captured.arguments[1].values()) or captured.arguments[0], {}),
        dynamic_shapes={"tensors": tuple(_shapes_in_order(captured))},
    )
    tapped = by_position.program(_Tapped(graph, [tap.node for tap in taps]))  # type: ignore[arg-type]
    outputs = len(case.outputs)
    reference = [_run(_module_of(tapped), captured, batch)[0] for batch in batches]
    candidate = _lowered_answers(case, exporter, tapped, outputs + len(taps), batches)
    for index, tap in enumerate(taps, start=outputs):
        one, other = (
            [[a[index].astype(np.float64) - tap.zero_point] for a in x] for x in (reference, candidate)
        )
        if _differs(one, other, case.least_snr_db):
            return _place(tap.operator)
    if _differs([r[:outputs] for r in reference], [c[:outputs] for c in candidate], case.least_snr_db):
        return _place(list(_keys(graph))[-1])
    return _file_or_fusion(case, exporter, captured, graph, batches)


def _file_or_fusion(
    case: Case, exporter: StagedExporter, captured: Captured, graph: GraphModule, batches: Sequence[Inputs]
) -> Place:
    """Why the looked-at program is right where the artifact is not."""
    fresh = _lowered_answers(case, exporter, captured.program(graph), len(case.outputs), batches)
    wanted = [_run(graph, captured, batch)[0] for batch in batches]
    if not _differs(wanted, fresh, case.least_snr_db):
        return Place(module=None, note="lowered again, the same graph is right: the file itself is damaged")
    return Place(module=None, note="it is right as soon as values between modules are looked at")


def _taps(graph: GraphModule) -> list[Tap]:
    """Where to look: the ends of modules, in order.

    Operators that the delegate fuses with the activation behind them are looked at behind it: a look in
    between would change the program. At most MAX_TAPS, spread evenly.
    """
    keys = _keys(graph)
    last = {
        node for output in graph.graph.output_node().all_input_nodes for node in (output, _source(output))
    }
    taps: dict[Node, Tap] = {}
    for node in _ends(keys):
        visible = next(iter(node.users)) if _is_fused(node) else node
        if visible not in last and _is_float(visible):
            taps.setdefault(visible, _tap(visible, _fused_start(node, keys)))
    step = math.ceil(len(taps) / MAX_TAPS) or 1
    return list(taps.values())[step - 1 :: step]


def _tap(visible: Node, operator: Node) -> Tap:
    """Looks at a quantized value as integers: ExecuTorch 1.4 answers zeros for it once dequantized.

    That holds for a value which the delegate also reads inside.
    """
    for user in visible.users:
        zero_point = user.args[2] if len(user.args) > 2 else None
        if _quantizes(user) and isinstance(zero_point, int):
            return Tap(node=user, operator=operator, zero_point=zero_point)
    return Tap(node=visible, operator=operator)


def _source(node: Node) -> Node:
    """The operator behind a quantization and its inverse."""
    while "quantize" in _operator(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_fused(node: Node) -> bool:
    return len(node.users) == 1 and _is_activation(next(iter(node.users)))


def _fused_start(node: Node, keys: Mapping[Node, Key]) -> Node:
    before = node.args[0] if node.args else None
    fused = _is_activation(node) and isinstance(before, Node) and before in keys and _is_fused(before)
    return before if fused else node  # type: ignore[return-value]


def _is_activation(node: Node) -> bool:
    _, _, name = _operator(node).partition(".")
    return name.partition(".")[0].rstrip("_") in FUSED_BEHIND


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _shapes_in_order(captured: Captured) -> list[Any]:
    shapes = captured.dynamic_shapes
    return [shapes[spec.name] for spec in captured.inputs] if isinstance(shapes, dict) else list(shapes)


def _lowered_answers(
    case: Case,
    exporter: StagedExporter,
    program: torch.export.ExportedProgram,
    outputs: int,
    batches: Sequence[Inputs],
) -> Answers:
    """A program lowered into a scratch file, and what its runtime answers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"bisect{exporter.suffix}"
        exporter.write(program, case.precision, file)
        return _runtime_answers(case, file, [f"output_{index}" for index in range(outputs)], batches)


def _module_of(program: torch.export.ExportedProgram) -> GraphModule:
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def _differs(reference: Answers, candidate: Answers, least_snr_db: float) -> bool:
    return _snr_db(reference, candidate) < least_snr_db or _stands_still(reference, candidate)


def _snr_db(reference: Answers, candidate: Answers) -> float:
    """The least SNR over the outputs, each over all batches; -inf where the numbers of values differ."""
    if len(reference[0]) != len(candidate[0]):
        return -math.inf
    pairs = zip(_by_output(reference), _by_output(candidate), strict=True)
    return min(
        (compare.snr_db(one, other) if one.shape == other.shape else -math.inf) for one, other in pairs
    )


def _by_output(answers: Answers) -> list[Array]:
    return [np.concatenate([array.ravel() for array in arrays]) for arrays in zip(*answers, strict=True)]


def _stands_still(reference: Answers, candidate: Answers) -> bool:
    """Whether the first floating-point output moves with the inputs before a stage and not behind it."""
    index = next((i for i, array in enumerate(reference[0]) if array.dtype.kind == "f"), None)
    if index is None:
        return False
    moves = [_moves([answer[index] for answer in answers]) for answers in (reference, candidate)]
    return moves == [True, False]


def _moves(arrays: Sequence[Array]) -> bool | None:
    """None where there are not two answers to tell by."""
    rows = [array.ravel() for array in arrays if array.shape == arrays[0].shape]
    if len(rows) == 1 and arrays[0].ndim:
        rows = [row.ravel() for row in arrays[0]]
    return compare.input_sensitive(np.stack(rows).astype(np.float64)) if len(rows) > 1 else None


def _worst(batches: Sequence[Inputs], before: Answers, after: Answers) -> list[Inputs]:
    """The batch that shows the mismatch best, then some of its size."""
    order = sorted(range(len(batches)), key=lambda i: _snr_db(before[i : i + 1], after[i : i + 1]))
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    return [batches[i] for i in order if sizes[i] == sizes[order[0]]][:LOCAL_BATCHES]


def _tensors(batch: Inputs) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def _array(value: Tensor) -> Array:
    """A copy as an array; the narrow floats, which numpy lacks or sums badly, as float32."""
    narrow = value.dtype in (torch.float16, torch.bfloat16)
    array: Array = (value.float() if narrow else value).detach().numpy().copy()
    return array
