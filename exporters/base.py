"""What every exporter offers, and the table that finds them.

An exporter turns a captured program into an artifact on disk and opens artifacts as sessions. It
imports its libraries only inside its own file, so that reading this table costs nothing.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from targets.errors import MissingRequirementError

if TYPE_CHECKING:
    import numpy as np

    from calibration.spec import TensorSpec
    from exporters.capture import Captured

    Arrays = Mapping[str, np.ndarray[Any, Any]]


class Form(StrEnum):
    """The forms of a model between the user's file and a measured build."""

    MODULE = "torch module"
    GRAPH = "exported graph"
    ARTIFACT = "artifact on disk"
    REPORT = "measured report"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator the delegate left out, where it stands in the user's model, and why."""

    operator: str
    module: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegated:
    """How many operators the delegate took."""

    delegate: str
    operators: int
    delegated: int
    left: tuple[Operator, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that a runtime loads. `outputs` are (name, shape, dtype)."""

    runtime: str
    file: Path
    precision: str
    delegated: Delegated | None


Observer = Literal["min-max", "percentile", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How to quantize: the observer of activations and the modules that stay float, by path."""

    observer: Observer = "min-max"
    keep_float: tuple[str, ...] = ()


class Session(Protocol):
    """An artifact, loaded. Inputs and outputs are arrays by name."""

    def run(self, inputs: "Arrays") -> "dict[str, np.ndarray[Any, Any]]":
        """One call. Raises ModelError for inputs that do not fit."""
        ...

    def prepare(self, inputs: "Arrays") -> Any:
        """The inputs in the runtime's own form, so that timing a call times the runtime alone."""
        ...

    def call(self, prepared: Any) -> None:
        """One call on prepared inputs, its outputs thrown away."""
        ...

    def set_threads(self, threads: int) -> None:
        """How many threads calls use from now on."""
        ...


class Exporter(Protocol):
    """A format: how to write it and how to run it."""

    runtime: str
    suffix: str
    precisions: tuple[str, ...]

    def export(
        self,
        captured: "Captured",
        *,
        precision: str,
        calibration: "Sequence[Arrays]",
        quantization: Quantization,
        file: Path,
    ) -> Artifact:
        """Writes the artifact. Raises ModelError for what the format cannot hold, naming its module."""
        ...

    def load_runtime(self) -> None:
        """Imports what `open` needs, so that an artifact's own memory can be told from its runtime's."""
        ...

    def open(
        self, file: Path, *, inputs: "Sequence[TensorSpec]", outputs: Sequence[str], threads: int
    ) -> Session:
        """Loads an artifact. Raises IntegrityError when the file is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the table: where the exporter is, and the extra and packages it needs."""

    attribute: str
    extra: str
    packages: tuple[str, ...]


EXPORTERS: dict[str, Entry] = {
    "executorch": Entry(
        attribute="exporters.executorch:ExecuTorchExporter",
        extra="executorch",
        packages=("torch", "executorch", "torchao", "safetensors", "torch_pruning"),
    ),
}


def missing_packages(runtime: str) -> tuple[str, ...]:
    """The packages this environment lacks for a runtime, without importing any."""
    from importlib.util import find_spec

    return tuple(name for name in EXPORTERS[runtime].packages if find_spec(name) is None)


def require_packages(runtime: str) -> None:
    """Raises MissingRequirementError, with the command that installs it, for what a runtime lacks here."""
    lacking = missing_packages(runtime)
    if lacking:
        extra = EXPORTERS[runtime].extra
        raise MissingRequirementError(
            f"the {runtime} exporter cannot run",
            found=f"no package {', '.join(lacking)}",
            expected=f"the extra {extra!r}",
            fix=f"pip install 'edge-deploy[{extra}]'",
        )


def find_exporter(runtime: str) -> Exporter:
    """The exporter of a runtime, its libraries loaded. Raises as `require_packages`."""
    require_packages(runtime)
    module, _, attribute = EXPORTERS[runtime].attribute.partition(":")
    exporter: Exporter = getattr(importlib.import_module(module), attribute)()
    return exporter
