"""What all stages of a build share: the plan, the data, the cache, and the dense module once it is needed."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from calibration.spec import TensorSpec, usable_batch
from deploy import foreign, huggingface, usercode
from deploy.cache import Cache, Entry, file_digest
from deploy.data import ProjectData
from deploy.environment import own_code, versions
from deploy.fingerprint import CodeFingerprints, data_fingerprint
from deploy.manifest import Stage
from deploy.planner import Plan
from deploy.project import ProjectTables
from targets.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATION_BATCH = 32

Announce = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Workbench:
    """One run of one plan. Mutable only in what it remembers of the run."""

    plan: Plan
    cache: Cache
    seed: int = 0
    refresh: bool = False
    announce: Announce = lambda text: None
    stages: list[Stage] = field(default_factory=list)
    data: ProjectData = field(init=False)
    _code: CodeFingerprints = field(init=False)
    _dense: "nn.Module | None" = field(default=None, init=False)
    _keys: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.data = ProjectData(self.plan.project, self.seed)
        self._code = CodeFingerprints(self.cache.root, self.folder)

    @property
    def folder(self) -> Path:
        """The project's folder."""
        return self.plan.project.folder

    @property
    def tables(self) -> ProjectTables:
        """The project's tables, with flags and the target's own laid over."""
        return self.plan.project.tables

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The project's inputs, in the order of deploy.toml."""
        return self.plan.project.specs()

    @property
    def threads(self) -> int:
        """The threads that latency is measured with and the manifest recommends: no more than here."""
        return max(1, min(self.plan.runtime.threads, os.cpu_count() or 1))

    @property
    def foreign(self) -> bool:
        """Whether the model is an ONNX file, and no torch module is behind it."""
        return foreign.is_model(self.tables.model.source)

    def batch(self, wanted: int = CALIBRATION_BATCH) -> int:
        """A batch near the wanted size that the inputs allow."""
        return usable_batch(self.specs, wanted)

    def dense(self) -> "nn.Module":
        """The user's module with its weights, loaded when first asked for."""
        if self._dense is None:
            from deploy.model import load_module

            self.announce("loading the model")
            self._dense = load_module(self.plan.project)
        return self._dense

    def factory(self) -> "nn.Module":
        """The user's module without its weights."""
        from deploy.model import run_factory

        return run_factory(self.tables.model.source, self.folder)

    def calibration_inputs(self, module: "nn.Module", size: int) -> "tuple[Tensor, ...]":
        """The first calibration samples as the module's forward takes them."""
        import torch

        from exporters.capture import order_inputs

        ordered, _ = order_inputs(module, self.specs)
        batch = self.data.calibration.batch(0, size)
        return tuple(torch.from_numpy(batch[spec.name]) for spec in ordered)

    def stage(self, name: str, ingredients: dict[str, Any], make: Callable[[Path], None]) -> Entry:
        """The entry of a stage, made when nothing in the cache has these ingredients.

        With --no-cache each stage runs once more, then its new result serves the rest of the run.
        """
        common = {
            "code": own_code(),
            "packages": versions(),
            "inputs": msgspec.to_builtins(self.tables.inputs),
        }
        first = all(stage.name != name for stage in self.stages)

        def announced(folder: Path) -> None:
            self.announce(name)
            make(folder)

        entry = self.cache.stage(
            name,
            {**common, **ingredients},
            announced,
            slot=f"{self.folder}\0{self.plan.target.name}\0{name}",
            refresh=self.refresh and first,
            on_wait=lambda: self.announce(f"{name}: another build is at it; waiting"),
        )
        if first:
            seconds = round(entry.seconds, 3)
            self.stages.append(Stage(name=name, seconds=seconds, cached=entry.cached, why=entry.why))
        return entry

    def model_key(self) -> str:
        """The hash of the model's code and weights, taken once a run."""
        return self._once("model", self._hash_model)

    def _once(self, name: str, make: Callable[[], str]) -> str:
        """Large files are read once however many stages depend on them."""
        if name not in self._keys:
            self._keys[name] = make()
        return self._keys[name]

    def _hash_model(self) -> str:
        table = self.tables.model
        if huggingface.is_folder(folder := self.plan.project.path(table.source)):
            return huggingface.fingerprint(folder)
        if foreign.is_model(folder):
            return foreign.fingerprint(folder)
        parts = [self._code.of(table.source, self.dense)]
        if table.weights:
            file = self.plan.project.path(table.weights)
            if not file.is_file():
                self.dense()  # tells what is missing
            parts.append(file_digest(file))
        return msgspec.json.encode(parts).decode()

    def data_key(self, name: str) -> str:
        """The hash of one of the project's data tables, with what selects and prepares its samples."""
        return self._once(name, lambda: self._hash_data(name))

    def _hash_data(self, name: str) -> str:
        table = getattr(self.tables, name)
        settings = [msgspec.to_builtins(each.preprocess) for each in self.tables.inputs.values()]
        source = data_fingerprint(table.source, self.folder, self._code) if table else "synthetic"
        return msgspec.json.encode([source, getattr(table, "samples", None), settings, self.seed]).decode()

    def metric_key(self) -> list[Any]:
        """What the metric is: its name and settings, and the code of a user's own."""
        evaluate = self.tables.evaluate
        if evaluate is None:
            return []
        reference, code = evaluate.metric, None
        if ".py:" in reference:
            code = self._code.of(
                reference, lambda: usercode.load_attribute(reference, self.folder, error=UsageError)
            )
        return [reference, evaluate.direction, evaluate.max_drop, code]


def write_json(file: Path, value: Any) -> None:
    """A stage's record."""
    file.write_bytes(msgspec.json.encode(value))


def read_json(file: Path, kind: Any) -> Any:
    """A stage's record back, as the type that was written."""
    return msgspec.json.decode(file.read_bytes(), type=kind)
