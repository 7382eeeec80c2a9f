"""The stages of a build, each cached by what goes into it, and the rungs they make.

Stages are lazy: a stage whose result is in the cache loads neither the model nor torch.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from calibration.spec import TensorSpec
from deploy import huggingface, ladder
from deploy.cache import Cache, Entry, file_digest
from deploy.data import ProjectData
from deploy.environment import cpu_name, own_code, versions
from deploy.fingerprint import CodeFingerprints, data_fingerprint
from deploy.manifest import Asked, LayerSensitivity, LayerWidths, RecoveryPoint, Stage
from deploy.planner import Plan, RungPlan
from exporters.base import Delegated, Quantization, find_exporter
from targets.errors import IntegrityError, ModelError, UsageError, WrongOutputsError

if TYPE_CHECKING:
    from torch import nn

    from deploy.validation.latency import Timing
    from deploy.validation.rung import Judge, Validated

CALIBRATION_BATCH = 32
LABELS_FOR_LOSS = ("taylor",)
SENSITIVITY_SAMPLES = 32
SENSITIVITY_LAYERS = 50
SENSITIVITY_MACS = 1e11
HIGHEST_SNR_DB = 200.0
MIXED_GAIN_DB = 6.0

Announce = Callable[[str], None]


class OutputInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An output as export found it."""

    name: str
    shape: list[int | str]
    dtype: str


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """export.json: what the export stage knows beside the artifact."""

    file: str
    size_bytes: int
    input_order: list[str]
    outputs: list[OutputInfo]
    delegated: Delegated | None


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """pruned.json: what pruning did."""

    widths: list[LayerWidths]
    asked: list[Asked]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters and multiply-adds of one sample."""

    parameters: int
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """A rung that was made and judged; `dropped` says why it cannot ship."""

    plan: RungPlan
    exported: Exported | None = None
    folder: Path | None = None
    validated: "Validated | None" = None
    golden: Path | None = None
    timing: "Timing | None" = None
    dropped: str | None = None

    @property
    def artifact(self) -> Path:
        """The artifact's file."""
        assert self.folder is not None
        assert self.exported is not None
        return self.folder / self.exported.file


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """Runs the stages of one plan. Mutable only in what it remembers of this run."""

    plan: Plan
    cache: Cache
    seed: int = 0
    refresh: bool = False
    announce: Announce = lambda text: None
    stages: list[Stage] = field(default_factory=list)
    unprunable: str | None = field(default=None, init=False)
    """Why nothing was pruned although the plan had it; None where that did not happen."""
    _data: ProjectData = field(init=False)
    _code: CodeFingerprints = field(init=False)
    _modules: dict[str, "nn.Module"] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._data = ProjectData(self.plan.project, self.seed)
        self._code = CodeFingerprints(self.cache.root, self.plan.project.folder)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The project's inputs."""
        return self.plan.project.specs()

    @property
    def threads(self) -> int:
        """The threads that latency is measured with, and that the manifest recommends: no more than here."""
        import os

        return max(1, min(self.plan.runtime.threads, os.cpu_count() or 1))

    def model_fingerprint(self) -> str:
        """The hash of the model's code and weights."""
        tables = self.plan.project.tables.model
        if huggingface.is_folder(folder := self.plan.project.path(tables.source)):
            return huggingface.fingerprint(folder)
        parts = [self._code.of(tables.source, lambda: self.module(False))]
        if tables.weights:
            file = self.plan.project.path(tables.weights)
            parts.append(file_digest(file) if file.is_file() else self._missing_weights())
        return msgspec.json.encode(parts).decode()

    def data_fingerprint(self, name: str) -> str:
        """The hash of one of the project's data tables, with what selects and prepares its samples."""
        table = getattr(self.plan.project.tables, name)
        settings = [msgspec.to_builtins(t.preprocess) for t in self.plan.project.tables.inputs.values()]
        chosen = getattr(table, "samples", None)
        source = (
            data_fingerprint(table.source, self.plan.project.folder, self._code) if table else "synthetic"
        )
        return msgspec.json.encode([source, chosen, settings, self.seed]).decode()

    def module(self, pruned: bool) -> "nn.Module":
        """The dense or the pruned and recovered float module, loaded when first asked for."""
        key = "pruned" if pruned else "dense"
        if key not in self._modules:
            self._modules[key] = self._load_pruned() if pruned else self._load_dense()
        return self._modules[key]

    def pruned(self) -> Pruned | None:
        """What pruning did, None when nothing was pruned."""
        if self.plan.pruning is None or self.unprunable:
            return None
        return msgspec.json.decode((self._prune().folder / "pruned.json").read_bytes(), type=Pruned)

    def recovery(self) -> list[RecoveryPoint]:
        """The recovery's curve, empty when there was none."""
        if self.unprunable:
            return []
        entry = self._recover()
        if entry is None:
            return []
        return msgspec.json.decode((entry.folder / "recovery.json").read_bytes(), type=list[RecoveryPoint])

    def rungs(self) -> list[RungResult]:
        """Every rung of the plan: made, validated and timed. Raises for a wrong float32 export."""
        made = [self._make(rung) for rung in self._planned()]
        made += [self._make(replace(r.plan, mixed=True)) for r in made if self._wants_mixed(r, made)]
        timings = self._time([rung for rung in made if rung.dropped is None])
        return [_with_timing(rung, timings) for rung in made]

    def _planned(self) -> tuple[RungPlan, ...]:
        """The plan's rungs; without the pruned ones where the model has nothing to prune."""
        dense = tuple(rung for rung in self.plan.rungs if not rung.pruned)
        if len(dense) == len(self.plan.rungs) or not self._cannot_prune():
            return self.plan.rungs
        return dense or tuple(replace(rung, pruned=False) for rung in self.plan.rungs)

    def _wants_mixed(self, rung: RungResult, made: list[RungResult]) -> bool:
        """Whether quantization costs accuracy that some layers in float would bring back."""
        if rung.plan.precision != "int8" or len(self.plan.rungs) == 1 or rung.exported is None:
            return False
        floats = [r for r in made if r.plan.pruned == rung.plan.pruned and r.plan.precision == "float32"]
        if any(accuracy_fails(self.plan, other) for other in floats):
            return False
        if rung.dropped is None:
            return accuracy_fails(self.plan, rung) is not None
        parity = rung.validated.parity if rung.validated else None
        return parity is not None and parity.snr_db >= (parity.min_snr_db or 0.0) - MIXED_GAIN_DB

    def sensitivity(self, rung: RungPlan) -> list[LayerSensitivity]:
        """Each layer's own quantization noise, on calibration data; empty for rungs without integers."""
        if rung.precision != "int8":
            return []
        name = f"sensitivity {'pruned' if rung.pruned else 'dense'}"
        ingredients = {
            "module": self._module_key(rung.pruned),
            "calibration": self.data_fingerprint("calibration"),
        }
        entry = self._stage(name, ingredients, lambda folder: self._run_sensitivity(rung, folder))
        layers = msgspec.json.decode(
            (entry.folder / "sensitivity.json").read_bytes(), type=list[LayerSensitivity]
        )
        kept = self._float_layers(rung)
        return [msgspec.structs.replace(layer, kept_float=layer.layer in kept) for layer in layers]

    def _run_sensitivity(self, rung: RungPlan, folder: Path) -> None:
        import torch

        from deploy.quantization.sensitivity import layer_sensitivity
        from exporters.capture import order_inputs

        module = self.module(rung.pruned)
        ordered, _ = order_inputs(module, self.specs)
        size = min(len(self._data.calibration), self._sensitivity_samples(rung))
        batch = self._data.calibration.batch(0, max(size, self._small_batch(1)))
        found = layer_sensitivity(module, [tuple(torch.from_numpy(batch[spec.name]) for spec in ordered)])
        layers = [
            LayerSensitivity(layer=name, snr_db=min(round(snr, 2), HIGHEST_SNR_DB), kept_float=False)
            for name, snr in found
        ]
        (folder / "sensitivity.json").write_bytes(msgspec.json.encode(layers))

    def _sensitivity_samples(self, rung: RungPlan) -> int:
        """As many samples as a second or so of arithmetic allows: one pass a layer."""
        passes = self.cost(rung.pruned).macs * SENSITIVITY_LAYERS
        return max(1, min(SENSITIVITY_SAMPLES, int(SENSITIVITY_MACS / max(passes, 1))))

    def _kept_float(self, rung: RungPlan) -> set[str]:
        """The layers that stay float in a mixed rung: the fewest that halve the amplitude of the noise."""
        from deploy.quantization.sensitivity import choose_float_layers, combined_snr_db

        layers = self.sensitivity(replace(rung, mixed=False))
        pairs = [(layer.layer, layer.snr_db) for layer in layers]
        wanted = combined_snr_db([snr for _, snr in pairs]) + MIXED_GAIN_DB
        chosen = choose_float_layers(pairs, wanted_snr_db=wanted)
        return {*chosen.layers, *self.plan.project.tables.quantize.exclude}

    def report_drop(self, rung: RungResult) -> Any:
        """The metric of the shipped rung on data that nothing else has seen; None without such data."""
        table = self.plan.project.tables.report
        if table is None or self.plan.project.tables.evaluate is None:
            return None
        entry = self._stage(
            "report",
            {"artifact": _key(rung), "data": self.data_fingerprint("report"), "metric": self._metric()},
            lambda folder: self._measure_report(rung, folder),
        )
        from deploy.validation.metrics import Drop

        return msgspec.json.decode((entry.folder / "report.json").read_bytes(), type=Drop)

    def _missing_weights(self) -> str:
        self.module(False)
        raise AssertionError("loading missing weights must raise")

    def _load_dense(self) -> "nn.Module":
        from deploy.model import load_module

        self.announce("loading the model")
        return load_module(self.plan.project)

    def _load_pruned(self) -> "nn.Module":
        from deploy.model import run_factory
        from deploy.pruning.delta import load_pruned

        source = self.plan.project.tables.model.source
        entry = self._recover() or self._prune()
        file = entry.folder / "module.safetensors"
        return load_pruned(lambda: run_factory(source, self.plan.project.folder), file).eval()

    def _stage(self, name: str, ingredients: dict[str, Any], make: Callable[[Path], None]) -> Entry:
        project = self.plan.project
        common = {
            "code": own_code(),
            "packages": versions(),
            "inputs": msgspec.to_builtins(project.tables.inputs),
        }
        slot = f"{project.folder}\0{self.plan.target.name}\0{name}"

        def announced(folder: Path) -> None:
            self.announce(name)
            make(folder)

        entry = self.cache.stage(
            name, {**common, **ingredients}, announced, slot=slot, refresh=self._refreshes(name)
        )
        if all(stage.name != name for stage in self.stages):
            stage = Stage(name=name, seconds=round(entry.seconds, 3), cached=entry.cached, why=entry.why)
            self.stages.append(stage)
        return entry

    def _refreshes(self, name: str) -> bool:
        """With --no-cache each stage runs once more, then its new result serves the rest of the run."""
        return self.refresh and all(stage.name != name for stage in self.stages)

    def _cannot_prune(self) -> bool:
        """Whether the model has nothing to prune, where nobody asked for a sparsity; else that raises."""
        pruning = self.plan.pruning
        if pruning is None or pruning.asked or self.unprunable:
            return bool(self.unprunable)
        try:
            self._prune()
        except (UsageError, ModelError) as error:
            self.unprunable = f"nothing was pruned: {error.message}"
        return bool(self.unprunable)

    def _prune(self) -> Entry:
        pruning = self.plan.pruning
        assert pruning is not None
        ingredients = {
            "model": self.model_fingerprint(),
            "pruning": msgspec.to_builtins(pruning),
            "calibration": self.data_fingerprint("calibration"),
        }
        return self._stage("prune", ingredients, self._run_prune)

    def _run_prune(self, folder: Path) -> None:
        import torch

        from deploy.pruning.channels import prune_channels
        from deploy.pruning.delta import save_pruned
        from exporters.capture import order_inputs

        pruning = self.plan.pruning
        assert pruning is not None
        module = self.module(False)
        ordered, _ = order_inputs(module, self.specs)
        batch = self._data.calibration.batch(0, self._small_batch())
        result = prune_channels(
            module,
            tuple(torch.from_numpy(batch[spec.name]) for spec in ordered),
            sparsity=pruning.sparsity,
            of=pruning.of,  # type: ignore[arg-type]
            criterion=pruning.criterion,  # type: ignore[arg-type]
            ranking=pruning.ranking,  # type: ignore[arg-type]
            min_channels=pruning.min_channels,
            channel_multiple=pruning.multiple,
            exclude=pruning.exclude,
            loss=self._calibration_loss() if pruning.criterion in LABELS_FOR_LOSS else None,
            seed=self.seed,
        )
        save_pruned(result.module, result.delta, folder / "module.safetensors")
        record = Pruned(
            widths=[
                LayerWidths(layer=change.layer, kind=change.kind, before=change.before, after=change.after)
                for change in result.layers
            ],
            asked=_asked(result),
        )
        (folder / "pruned.json").write_bytes(msgspec.json.encode(record))

    def _calibration_loss(self) -> Any:
        from deploy.pruning.objective import calibration_loss

        return calibration_loss(self._data.calibration, self.specs, batch=CALIBRATION_BATCH)

    def _recover(self) -> Entry | None:
        table = self.plan.project.tables.recover
        if table is None or self.plan.pruning is None or table.epochs == 0:
            return None
        ingredients = {
            "pruned": self._prune().folder.name,
            "training": self.data_fingerprint("recover"),
            "recover": msgspec.to_builtins(table),
        }
        return self._stage("recover", ingredients, self._run_recover)

    def _run_recover(self, folder: Path) -> None:
        from deploy.model import run_factory
        from deploy.pruning.delta import load_pruned, read_delta, save_pruned
        from deploy.recovery.finetune import TrainingData, recover
        from exporters.capture import order_inputs

        table, training = self.plan.project.tables.recover, self._data.training
        assert table is not None
        assert training is not None
        start = self._prune().folder / "module.safetensors"
        source = self.plan.project.tables.model.source
        student = load_pruned(lambda: run_factory(source, self.plan.project.folder), start)
        ordered, _ = order_inputs(student, self.specs)
        batch = training.batch(0, len(training))
        checkpoint = self.cache.root / "resume" / f"{self._prune().folder.name}-{self.seed}.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        result = recover(
            student,
            self.module(False),
            TrainingData(inputs={spec.name: batch[spec.name] for spec in ordered}, labels=training.labels),
            epochs=table.epochs,
            learning_rate=table.learning_rate,
            batch_size=table.batch_size,
            seed=self.seed,
            checkpoint=checkpoint,
            on_progress=lambda p: self.announce(f"recover: epoch {p.epoch}, {p.seconds_left:.0f} s left"),
        )
        save_pruned(result.module, read_delta(start), folder / "module.safetensors")
        curve = [RecoveryPoint(epoch=e, loss=loss, score=score) for e, loss, score in result.history]
        (folder / "recovery.json").write_bytes(msgspec.json.encode(curve))
        checkpoint.unlink(missing_ok=True)

    def _module_key(self, pruned: bool) -> str:
        if not pruned:
            return self.model_fingerprint()
        return (self._recover() or self._prune()).folder.name

    def cost(self, pruned: bool) -> Cost:
        """Parameters and multiply-adds of the dense or pruned module."""
        name = "cost-pruned" if pruned else "cost-dense"
        entry = self._stage(
            name, {"module": self._module_key(pruned)}, lambda folder: self._count(pruned, folder)
        )
        return msgspec.json.decode((entry.folder / "cost.json").read_bytes(), type=Cost)

    def _count(self, pruned: bool, folder: Path) -> None:
        from deploy.pruning.cost import count_cost
        from exporters.capture import check_forward, example, order_inputs

        module = self.module(pruned)
        check_forward(module, self.specs)
        ordered, _ = order_inputs(module, self.specs)
        smallest = {name: low for spec in self.specs for name, (low, _) in spec.bounds.items()}
        cost = count_cost(module, tuple(example(spec, **smallest) for spec in ordered))
        (folder / "cost.json").write_bytes(
            msgspec.json.encode(Cost(parameters=cost.parameters, macs=cost.macs))
        )

    def _make(self, rung: RungPlan) -> RungResult:
        """One rung exported and validated. A lossy rung that fails is dropped; a float32 one raises."""
        result = RungResult(plan=rung)
        try:
            entry = self._export(rung)
            exported = msgspec.json.decode((entry.folder / "export.json").read_bytes(), type=Exported)
            result = RungResult(plan=rung, exported=exported, folder=entry.folder)
            judged = self._validate(result)
        except (ModelError, WrongOutputsError) as error:
            if rung.precision == "float32":
                raise
            return replace(result, dropped=error.message)
        return _judged(result, judged)

    def _export(self, rung: RungPlan) -> Entry:
        quantize = self.plan.project.tables.quantize
        ingredients = {
            "module": self._module_key(rung.pruned),
            "runtime": self.plan.runtime.name,
            "precision": rung.precision,
            "outputs": list(self.plan.project.tables.outputs),
            "quantize": msgspec.to_builtins(quantize) if rung.precision.startswith("int") else None,
            "calibration": self.data_fingerprint("calibration") if rung.precision.startswith("int") else None,
            "kept_float": sorted(self._float_layers(rung)),
        }
        return self._stage(f"export {rung.name}", ingredients, lambda folder: self._run_export(rung, folder))

    def _run_export(self, rung: RungPlan, folder: Path) -> None:
        from exporters.capture import capture

        exporter = find_exporter(self.plan.runtime.name)
        captured = capture(
            self.module(rung.pruned), self.specs, output_names=list(self.plan.project.tables.outputs)
        )
        file = folder / f"model{exporter.suffix}"
        artifact = exporter.export(
            captured,
            precision=rung.precision,
            calibration=list(self._data.calibration.batches(self._small_batch())),
            quantization=self._quantization(rung),
            file=file,
        )
        record = Exported(
            file=file.name,
            size_bytes=file.stat().st_size,
            input_order=[spec.name for spec in captured.inputs],
            outputs=[OutputInfo(name=o.name, shape=list(o.shape), dtype=o.dtype) for o in captured.outputs],
            delegated=artifact.delegated,
        )
        (folder / "export.json").write_bytes(msgspec.json.encode(record))

    def _float_layers(self, rung: RungPlan) -> set[str]:
        return self._kept_float(rung) if rung.mixed else set(self.plan.project.tables.quantize.exclude)

    def _small_batch(self, wanted: int = CALIBRATION_BATCH) -> int:
        from deploy.validation.rung import usable_batch

        return usable_batch(self.specs, wanted)

    def _metric(self) -> list[Any]:
        evaluate = self.plan.project.tables.evaluate
        if evaluate is None:
            return []
        code = self._code_of_metric(evaluate.metric) if ".py:" in evaluate.metric else None
        return [evaluate.metric, evaluate.direction, evaluate.max_drop, code]

    def _code_of_metric(self, reference: str) -> str:
        from deploy import usercode

        folder = self.plan.project.folder
        return self._code.of(reference, lambda: usercode.load_attribute(reference, folder, error=UsageError))

    def _validate(self, rung: RungResult) -> Entry:
        tables = self.plan.project.tables
        assert rung.folder is not None
        ingredients = {
            "artifact": rung.folder.name,
            "module": self._module_key(rung.plan.pruned),
            "dense": self.model_fingerprint(),
            "data": self.data_fingerprint("evaluate" if tables.evaluate else "calibration"),
            "metric": self._metric(),
            "parity": tables.parity.min_snr_db,
        }
        return self._stage(
            f"validate {rung.plan.name}", ingredients, lambda folder: self._run_validate(rung, folder)
        )

    def _run_validate(self, rung: RungResult, folder: Path) -> None:
        from deploy.validation.rung import validate

        assert rung.exported is not None
        outputs = [output.name for output in rung.exported.outputs]
        with self._session(rung) as session:
            validated = validate(
                session,
                self.module(rung.plan.pruned),
                self._dense_outputs(outputs),
                self._judge(),
                outputs=outputs,
                precision=rung.plan.precision,
                golden_folder=folder,
            )
        if validated.wrong:
            wrong = f"{validated.wrong}; {self._where_wrong(rung, validated)}"
            validated = msgspec.structs.replace(validated, wrong=wrong)
        if validated.wrong and rung.plan.precision == "float32":
            raise WrongOutputsError(
                f"{rung.plan.name}: {validated.wrong}", expected="what the module computes"
            )
        (folder / "validated.json").write_bytes(msgspec.json.encode(validated))

    def _where_wrong(self, rung: RungResult, validated: "Validated") -> str:
        """The first stage and module whose outputs differ, or why they could not be found."""
        from deploy.validation.bisect import Case, explain

        assert rung.exported is not None
        assert validated.parity.min_snr_db is not None
        self.announce(f"looking for what is wrong in {rung.plan.name}")
        case = Case(
            module=self.module(rung.plan.pruned),
            data=self._data.parity,
            sizes=validated.parity.batches,
            runtime=self.plan.runtime.name,
            precision=rung.plan.precision,
            least_snr_db=validated.parity.min_snr_db,
            artifact=rung.artifact,
            inputs=rung.exported.input_order,
            outputs=[output.name for output in rung.exported.outputs],
            output_names=list(self.plan.project.tables.outputs),
            calibration=list(self._data.calibration.batches(self._small_batch())),
            quantization=self._quantization(rung.plan),
            threads=self.threads,
        )
        return explain(case)

    def _quantization(self, rung: RungPlan) -> Quantization:
        observer = self.plan.project.tables.quantize.observer
        return Quantization(observer=observer, keep_float=tuple(sorted(self._float_layers(rung))))

    def _session(self, rung: RungResult) -> Any:
        """The rung's artifact, opened. Raises WrongOutputsError when its own runtime refuses it."""
        from deploy.validation.remote import RemoteSession

        assert rung.exported is not None
        by_name = {spec.name: spec for spec in self.specs}
        try:
            return RemoteSession(
                self.plan.runtime.name,
                rung.artifact,
                inputs=[by_name[name] for name in rung.exported.input_order],
                outputs=[output.name for output in rung.exported.outputs],
                threads=self.threads,
            )
        except IntegrityError as error:
            raise WrongOutputsError(
                f"the runtime refuses what was just made for {rung.plan.name}",
                found=error.message.rstrip("."),
            ) from error

    def _judge(self) -> "Judge":
        from deploy.validation.rung import Judge

        project = self.plan.project
        return Judge(
            parity_data=self._data.parity,
            evaluation=self._data.evaluation,
            evaluate=project.tables.evaluate,
            folder=project.folder,
            min_snr_db=project.tables.parity.min_snr_db,
            seed=self.seed,
        )

    def _dense_outputs(self, outputs: list[str]) -> dict[str, Any] | None:
        """The dense float model's own outputs on the evaluation data."""
        if self._data.evaluation is None:
            return None
        import numpy as np

        entry = self._stage(
            "reference",
            {
                "model": self.model_fingerprint(),
                "data": self.data_fingerprint("evaluate"),
                "outputs": outputs,
            },
            lambda folder: self._run_reference(outputs, folder),
        )
        with np.load(entry.folder / "outputs.npz") as arrays:
            return {name: arrays[name] for name in outputs}

    def _run_reference(self, outputs: list[str], folder: Path) -> None:
        import numpy as np

        from deploy.validation.rung import module_predict, predict_all, usable_batch

        assert self._data.evaluation is not None
        predict = module_predict(self.module(False), self.specs, outputs)
        arrays = predict_all(predict, self._data.evaluation, batch=usable_batch(self.specs))
        np.savez(folder / "outputs.npz", **arrays)  # type: ignore[arg-type] # numpy's stub lacks plain **arrays

    def _measure_report(self, rung: RungResult, folder: Path) -> None:
        from deploy.validation.rung import measure_drop, module_predict, predict_all, usable_batch

        assert rung.exported is not None
        assert self._data.report is not None
        outputs = [output.name for output in rung.exported.outputs]
        predict = module_predict(self.module(False), self.specs, outputs)
        dense = predict_all(predict, self._data.report, batch=usable_batch(self.specs))
        with self._session(rung) as session:
            drop = measure_drop(session.run, dense, self._data.report, self._judge(), outputs)
        (folder / "report.json").write_bytes(msgspec.json.encode(drop))

    def _time(self, rungs: list[RungResult]) -> dict[str, "Timing"]:
        if not rungs:
            return {}
        from deploy.validation.latency import Timing

        ingredients = {
            "artifacts": [[rung.plan.name, _key(rung)] for rung in rungs],
            "machine": cpu_name(),
            "threads": self.threads,
        }
        entry = self._stage("latency", ingredients, lambda folder: self._run_time(rungs, folder))
        return msgspec.json.decode((entry.folder / "latency.json").read_bytes(), type=dict[str, Timing])

    def _run_time(self, rungs: Iterable[RungResult], folder: Path) -> None:
        from deploy.validation.latency import time_interleaved
        from deploy.validation.rung import usable_batch

        inputs = self._data.parity.batch(0, usable_batch(self.specs, 1))
        with ExitStack() as stack:
            sessions = {rung.plan.name: stack.enter_context(self._session(rung)) for rung in rungs}
            for session in sessions.values():
                session.prepare(inputs)
            timings = time_interleaved(sessions)
        (folder / "latency.json").write_bytes(msgspec.json.encode(timings))

    @property
    def batch(self) -> int:
        """The batch that latency was measured with."""
        from deploy.validation.rung import usable_batch

        return usable_batch(self.specs, 1)


def accuracy_fails(plan: Plan, rung: RungResult) -> str | None:
    """Why a judged rung may not ship for its accuracy; None when it may, or when nothing was measured."""
    evaluate = plan.project.tables.evaluate
    drop = rung.validated.drop if rung.validated else None
    return None if evaluate is None or drop is None else ladder.drop_fails(drop, evaluate)


def _key(rung: RungResult) -> str:
    assert rung.folder is not None
    return rung.folder.name


def _asked(result: Any) -> list[Asked]:
    before, after = result.before, result.after
    asked = {result.of: result.asked}
    shares = {"macs": 1 - after.macs / before.macs, "parameters": 1 - after.parameters / before.parameters}
    return [
        Asked(
            quantity=name,
            asked=asked.get(name, 0.0),
            achieved=round(share, 4),
            note=result.note if name == result.of else "follows from the widths",
        )
        for name, share in shares.items()
    ]


def _judged(result: RungResult, entry: Entry) -> RungResult:
    from deploy.validation.rung import Validated

    validated = msgspec.json.decode((entry.folder / "validated.json").read_bytes(), type=Validated)
    return replace(result, validated=validated, golden=entry.folder, dropped=validated.wrong)


def _with_timing(rung: RungResult, timings: "dict[str, Timing]") -> RungResult:
    return replace(rung, timing=timings.get(rung.plan.name))
