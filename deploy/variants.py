"""The modules that rungs are made of: the dense one, and the pruned and recovered one."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deploy import foreign
from deploy.cache import Entry
from deploy.manifest import Asked, LayerWidths, RecoveryPoint
from deploy.workbench import Workbench, read_json, write_json
from targets.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from deploy.pruning.channels import ChannelPruning

MODULE = "module.safetensors"


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """pruned.json: what pruning did."""

    widths: list[LayerWidths]
    asked: list[Asked]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters and multiply-adds of one sample."""

    parameters: int
    macs: int


class Variants:
    """The dense and the pruned module of one run, each made when it is first asked for."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._pruned: nn.Module | None = None
        self.unprunable: str | None = None
        """Why nothing was pruned although the plan had it; None where that did not happen."""

    def module(self, pruned: bool) -> "nn.Module":
        """The float module of a variant."""
        if not pruned:
            return self._bench.dense()
        if self._pruned is None:
            from deploy.pruning.delta import load_pruned

            entry = self._recover() or self._prune()
            self._pruned = load_pruned(self._bench.factory, entry.folder / MODULE).eval()
        return self._pruned

    def key(self, pruned: bool) -> str:
        """What a variant hashes to."""
        return (self._recover() or self._prune()).folder.name if pruned else self._bench.model_key()

    def cost(self, pruned: bool) -> Cost:
        """What one sample costs in a variant."""
        name = f"cost-{'pruned' if pruned else 'dense'}"
        entry = self._bench.stage(
            name, {"module": self.key(pruned)}, lambda folder: self._count(pruned, folder)
        )
        cost: Cost = read_json(entry.folder / "cost.json", Cost)
        return cost

    def cannot_prune(self) -> bool:
        """Whether the model has nothing to prune, where nobody asked for a sparsity; else that raises."""
        pruning = self._bench.plan.pruning
        if pruning is None or pruning.asked or self.unprunable:
            return bool(self.unprunable)
        try:
            self._prune()
        except (UsageError, ModelError) as error:
            self.unprunable = f"nothing was pruned: {error.message}"
        return bool(self.unprunable)

    def pruned(self) -> Pruned | None:
        """What pruning did, None when nothing was pruned."""
        if self._bench.plan.pruning is None or self.unprunable:
            return None
        record: Pruned = read_json(self._prune().folder / "pruned.json", Pruned)
        return record

    def recovery(self) -> list[RecoveryPoint]:
        """The recovery's curve, empty when there was none."""
        entry = None if self.unprunable else self._recover()
        return [] if entry is None else read_json(entry.folder / "recovery.json", list[RecoveryPoint])

    def _prune(self) -> Entry:
        bench, pruning = self._bench, self._bench.plan.pruning
        ingredients = {
            "model": bench.model_key(),
            "pruning": msgspec.to_builtins(pruning),
            "calibration": bench.data_key("calibration"),
        }
        return bench.stage("prune", ingredients, self._run_prune)

    def _run_prune(self, folder: Path) -> None:
        from deploy.pruning.delta import save_pruned
        from deploy.pruning.planned import prune_as_planned
        from exporters.capture import positional

        bench, pruning = self._bench, self._bench.plan.pruning
        assert pruning is not None
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
        write_json(folder / "pruned.json", Pruned(widths=widths, asked=_asked(result)))

    def _recover(self) -> Entry | None:
        bench, table = self._bench, self._bench.tables.recover
        if table is None or bench.plan.pruning is None or table.epochs == 0:
            return None
        ingredients = {
            "pruned": self._prune().folder.name,
            "training": bench.data_key("recover"),
            "recover": msgspec.to_builtins(table),
        }
        return bench.stage("recover", ingredients, self._run_recover)

    def _run_recover(self, folder: Path) -> None:
        from deploy.pruning.delta import load_pruned, read_delta, save_pruned
        from deploy.recovery.finetune import TrainingData, recover
        from exporters.capture import order_inputs

        bench, table, training = self._bench, self._bench.tables.recover, self._bench.data.training
        assert table is not None
        assert training is not None
        start = self._prune().folder
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
        )
        save_pruned(result.module, read_delta(start / MODULE), folder / MODULE)
        curve = [RecoveryPoint(epoch=epoch, loss=loss, score=score) for epoch, loss, score in result.history]
        write_json(folder / "recovery.json", curve)
        checkpoint.unlink(missing_ok=True)

    def _count(self, pruned: bool, folder: Path) -> None:
        if self._bench.foreign:
            file = self._bench.plan.project.path(self._bench.tables.model.source)
            parameters, macs = foreign.cost(foreign.read(file), self._bench.specs)
            write_json(folder / "cost.json", Cost(parameters=parameters, macs=macs))
            return
        from deploy.pruning.cost import count_cost
        from exporters.capture import check_forward, example, order_inputs, positional

        module, specs = self.module(pruned), self._bench.specs
        check_forward(module, specs)
        ordered, _ = order_inputs(module, specs)
        smallest = {name: low for spec in specs for name, (low, _) in spec.bounds.items()}
        cost = count_cost(positional(module, specs), tuple(example(spec, **smallest) for spec in ordered))
        write_json(folder / "cost.json", Cost(parameters=cost.parameters, macs=cost.macs))


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
