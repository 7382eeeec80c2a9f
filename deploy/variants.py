"""The modules that rungs are made of: the dense one, and those pruned by each pattern and recovered."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deploy import foreign
from deploy.cache import Entry
from deploy.manifest import Asked, LayerWeights, LayerWidths, RecoveryPoint
from deploy.planner import Pruning
from deploy.workbench import Workbench, read_json, write_json
from exporters import external_data
from targets.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from deploy.pruning.channels import ChannelPruning
    from deploy.pruning.masks import LayerMask

DENSE = "dense"
MODULE, ONNX_MODULE = "module.safetensors", "module.onnx"


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """pruned.json: what pruning did: the widths of layers that lost channels, or the zeros of masks."""

    widths: list[LayerWidths] = []
    masks: list[LayerWeights] = []
    asked: list[Asked]

    @property
    def zero_share(self) -> float:
        """The share of zeros among all weights of masked layers."""
        weights = sum(layer.weights for layer in self.masks)
        return sum(layer.zeros for layer in self.masks) / weights if weights else 0.0


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters and multiply-adds of one sample."""

    parameters: int
    macs: int


class Variants:
    """The modules of one run by their pattern, each made when it is first asked for."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._modules: dict[str, nn.Module] = {}
        self._unprunable: dict[str, str] = {}

    @property
    def unprunable(self) -> str | None:
        """Why nothing was pruned although the plan had it; None where that did not happen."""
        return next(iter(self._unprunable.values()), None)

    def module(self, pattern: str) -> "nn.Module":
        """The float module of a variant."""
        if pattern == DENSE:
            return self._bench.dense()
        if pattern not in self._modules:
            self._modules[pattern] = self._load(pattern).eval()
        return self._modules[pattern]

    def onnx_file(self, pattern: str) -> Path:
        """The ONNX model of a variant, where the project's model is one."""
        if pattern == DENSE:
            return self._bench.plan.project.path(self._bench.tables.model.source)
        return self._prune(pattern).folder / ONNX_MODULE

    def key(self, pattern: str) -> str:
        """What a variant hashes to."""
        return self._bench.model_key() if pattern == DENSE else self._finished(pattern).folder.name

    def cost(self, pattern: str) -> Cost:
        """What one sample costs in a variant; zeros count like other weights."""
        entry = self._bench.stage(
            f"cost {pattern}", {"module": self.key(pattern)}, lambda folder: self._count(pattern, folder)
        )
        cost: Cost = read_json(entry.folder / "cost.json", Cost)
        return cost

    def cannot_prune(self, pattern: str) -> bool:
        """Whether the model has nothing to prune so, where nobody asked for a sparsity; else that raises."""
        pruning = self._bench.plan.prunings.get(pattern)
        if pruning is None or pruning.asked or pattern in self._unprunable:
            return pattern in self._unprunable
        try:
            self._prune(pattern)
        except (UsageError, ModelError) as error:
            self._unprunable[pattern] = f"nothing was pruned: {error.message}"
        return pattern in self._unprunable

    def pruned(self, pattern: str) -> Pruned | None:
        """What pruning did, None when nothing was pruned."""
        if pattern not in self._bench.plan.prunings or pattern in self._unprunable:
            return None
        record: Pruned = read_json(self._prune(pattern).folder / "pruned.json", Pruned)
        return record

    def recovery(self, pattern: str) -> list[RecoveryPoint]:
        """The recovery's curve, empty when there was none."""
        if self.pruned(pattern) is None or not self._recovers:
            return []
        entry = self._recover(pattern)
        curve: list[RecoveryPoint] = read_json(entry.folder / "recovery.json", list[RecoveryPoint])
        return curve

    def _load(self, pattern: str) -> "nn.Module":
        if self._bench.foreign:
            module: nn.Module = foreign.load_module(self.onnx_file(pattern), self._bench.specs)
            return module
        from deploy.pruning.delta import load_pruned

        return load_pruned(self._bench.factory, self._finished(pattern).folder / MODULE)

    @property
    def _recovers(self) -> bool:
        """Whether what was pruned is trained again: an ONNX model has nothing to train."""
        table = self._bench.tables.recover
        return table is not None and table.epochs > 0 and not self._bench.foreign

    def _finished(self, pattern: str) -> Entry:
        return self._recover(pattern) if self._recovers else self._prune(pattern)

    def _prune(self, pattern: str) -> Entry:
        bench = self._bench
        pruning = bench.plan.prunings[pattern]
        ingredients = {
            "model": bench.model_key(),
            "pruning": msgspec.to_builtins(pruning),
            "calibration": bench.data_key("calibration"),
        }
        return bench.stage(f"prune {pattern}", ingredients, lambda folder: self._run_prune(pruning, folder))

    def _run_prune(self, pruning: Pruning, folder: Path) -> None:
        if pruning.pattern == "structured":
            pruned = self._cut_channels(pruning, folder)
        elif self._bench.foreign:
            pruned = self._mask_foreign(pruning, folder)
        else:
            pruned = self._mask(pruning, folder)
        write_json(folder / "pruned.json", pruned)

    def _cut_channels(self, pruning: Pruning, folder: Path) -> Pruned:
        from deploy.pruning.delta import save_pruned
        from deploy.pruning.planned import prune_as_planned
        from exporters.capture import positional

        bench = self._bench
        if positional(bench.dense(), bench.specs) is not bench.dense():
            raise ModelError(
                "channels cannot be traced: the inputs are not forward's first parameters",
                found=", ".join(spec.name for spec in bench.specs),
                fix="reorder the parameters of forward, or name the ones between in [inputs]",
            )
        result = prune_as_planned(bench.dense(), bench.data.calibration, pruning, seed=bench.seed)
        save_pruned(result.module, result.delta, folder / MODULE)
        widths = [
            LayerWidths(layer=c.layer, kind=c.kind, before=c.before, after=c.after) for c in result.layers
        ]
        return Pruned(widths=widths, asked=_asked(result))

    def _mask(self, pruning: Pruning, folder: Path) -> Pruned:
        import copy

        from deploy.pruning import masks
        from deploy.pruning.delta import ArchitectureDelta, save_pruned

        module = copy.deepcopy(self._bench.dense())
        found = masks.magnitude_masks(
            module, sparsity=pruning.sparsity, ranking=pruning.ranking, exclude=pruning.exclude
        )
        masks.apply_(module, found)
        save_pruned(module, ArchitectureDelta(), folder / MODULE)
        return _masked(found, pruning)

    def _mask_foreign(self, pruning: Pruning, folder: Path) -> Pruned:
        from deploy.pruning import onnx_masks

        file = self.onnx_file(DENSE)
        model = foreign.prepared(file, self._bench.specs)
        external_data.load_(external_data.tensors_of(model.graph), file.parent)
        found = onnx_masks.magnitude_masks_(
            model.graph, sparsity=pruning.sparsity, ranking=pruning.ranking, exclude=pruning.exclude
        )
        external_data.save(model, folder / ONNX_MODULE)
        return _masked(found, pruning)

    def _recover(self, pattern: str) -> Entry:
        bench = self._bench
        ingredients = {
            "pruned": self._prune(pattern).folder.name,
            "training": bench.data_key("recover"),
            "recover": msgspec.to_builtins(bench.tables.recover),
        }
        return bench.stage(
            f"recover {pattern}", ingredients, lambda folder: self._run_recover(pattern, folder)
        )

    def _run_recover(self, pattern: str, folder: Path) -> None:
        from deploy.pruning.delta import load_pruned, read_delta, save_pruned
        from deploy.pruning.masks import held
        from deploy.recovery.finetune import TrainingData, recover
        from exporters.capture import order_inputs

        bench, table, training = self._bench, self._bench.tables.recover, self._bench.data.training
        assert table is not None
        assert training is not None
        start, record = self._prune(pattern).folder, self.pruned(pattern)
        assert record is not None
        student = load_pruned(bench.factory, start / MODULE)
        batch = training.batch(0, len(training))
        ordered, _ = order_inputs(student, bench.specs)
        checkpoint = bench.cache.root / "resume" / f"{start.name}-{bench.seed}.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        result = recover(
            student,
            bench.dense(),
            TrainingData(inputs={spec.name: batch[spec.name] for spec in ordered}, labels=training.labels),
            epochs=table.epochs,
            learning_rate=table.learning_rate,
            batch_size=table.batch_size,
            seed=bench.seed,
            checkpoint=checkpoint,
            on_progress=lambda p: bench.announce(f"recover: epoch {p.epoch}, {p.seconds_left:.0f} s left"),
            masks=held(student, [layer.layer for layer in record.masks]),
        )
        save_pruned(result.module, read_delta(start / MODULE), folder / MODULE)
        curve = [RecoveryPoint(epoch=epoch, loss=loss, score=score) for epoch, loss, score in result.history]
        write_json(folder / "recovery.json", curve)
        checkpoint.unlink(missing_ok=True)

    def _count(self, pattern: str, folder: Path) -> None:
        if self._bench.foreign:
            parameters, macs = foreign.cost(foreign.read(self.onnx_file(pattern)), self._bench.specs)
            write_json(folder / "cost.json", Cost(parameters=parameters, macs=macs))
            return
        from deploy.pruning.cost import count_cost
        from exporters.capture import check_forward, example, order_inputs, positional

        module, specs = self.module(pattern), self._bench.specs
        check_forward(module, specs)
        ordered, _ = order_inputs(module, specs)
        smallest = {name: low for spec in specs for name, (low, _) in spec.bounds.items()}
        cost = count_cost(positional(module, specs), tuple(example(spec, **smallest) for spec in ordered))
        write_json(folder / "cost.json", Cost(parameters=cost.parameters, macs=cost.macs))


def _masked(found: "Sequence[LayerMask]", pruning: Pruning) -> Pruned:
    layers = [LayerWeights(layer=m.layer, kind=m.kind, weights=m.weights, zeros=m.zeros) for m in found]
    pruned = Pruned(masks=layers, asked=[])
    achieved = Asked(
        quantity="weights",
        asked=pruning.sparsity,
        achieved=round(pruned.zero_share, 4),
        note="of the layers that masks may thin: all but the first, the last, depthwise and excluded ones",
    )
    return msgspec.structs.replace(pruned, asked=[achieved])


def _asked(result: "ChannelPruning") -> list[Asked]:
    before, after = result.before, result.after
    shares = {"macs": 1 - after.macs / before.macs, "parameters": 1 - after.parameters / before.parameters}
    return [
        Asked(
            quantity=name,
            asked=result.asked if name == result.of else None,
            achieved=round(share, 4),
            note=result.note if name == result.of else "follows from the widths",
        )
        for name, share in shares.items()
    ]
