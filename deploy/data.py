"""The data a project names, as datasets, each loaded at most once and only when a stage needs it."""

import functools
from pathlib import Path
from typing import Any

import msgspec

from calibration import preprocess, sources
from calibration.dataset import Dataset, synthetic
from calibration.preprocess import Preprocess
from deploy import usercode
from deploy.project import DataTable, EvaluateTable, Project, RecoverTable
from targets.errors import UsageError

FEW_SAMPLES = 8
SYNTHETIC_SAMPLES = 64

AnyTable = DataTable | EvaluateTable | RecoverTable


class ProjectData:
    """Calibration, evaluation, report and training samples of one project."""

    def __init__(self, project: Project, seed: int) -> None:
        self._project = project
        self._seed = seed

    @functools.cached_property
    def preprocessing(self) -> dict[str, Preprocess]:
        """The preprocessing of each input that declares one."""
        tables = self._project.tables.inputs
        return {
            name: preprocess.from_mapping(msgspec.to_builtins(table.preprocess))
            for name, table in tables.items()
            if table.preprocess is not None
        }

    @functools.cached_property
    def calibration(self) -> Dataset:
        """What ranges and statistics are learned from; synthetic when deploy.toml names nothing."""
        table = self._project.tables.calibration
        if table is None:
            return synthetic(self._project.specs(), samples=SYNTHETIC_SAMPLES, seed=self._seed)
        data = self._load(table)
        if len(data) < FEW_SAMPLES:
            raise UsageError(
                f"too few calibration samples in {table.source}",
                found=len(data),
                expected=f"at least {FEW_SAMPLES}; 100 to 500 are usual",
                fix="add samples, or raise [calibration] samples where that is what limits them",
            )
        return data

    @functools.cached_property
    def evaluation(self) -> Dataset | None:
        """What chooses among rungs; None without real data."""
        table = self._project.tables.evaluate
        return None if table is None or table.source == sources.SYNTHETIC else self._load(table)

    @functools.cached_property
    def report(self) -> Dataset | None:
        """What only the shipped rung ever sees."""
        table = self._project.tables.report
        return None if table is None else self._load(table)

    @functools.cached_property
    def training(self) -> Dataset | None:
        """What recovery trains on."""
        table = self._project.tables.recover
        return None if table is None else self._load(table)

    @property
    def parity(self) -> Dataset:
        """Real inputs for comparing outputs: evaluation data where there is any."""
        return self.evaluation or self.calibration

    def _load(self, table: AnyTable) -> Dataset:
        folder: Path = self._project.folder

        def call(reference: str) -> Any:
            function = usercode.load_attribute(reference, folder, error=UsageError)
            made = usercode.call(function, reference=reference, folder=folder, error=UsageError)
            if isinstance(made, dict):
                return made
            return usercode.iterate(made, reference=reference, folder=folder, error=UsageError)

        return sources.load(
            table.source,
            folder,
            self._project.specs(),
            samples=table.samples,
            preprocessing=self.preprocessing,
            seed=self._seed,
            user_function=call,
        )
