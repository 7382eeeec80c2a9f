"""What every exporter offers, and the table that finds them.

An exporter turns a captured program into an artifact on disk and opens artifacts as sessions. It
imports its libraries only inside its own file, so that reading this table costs nothing.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from exporters.isolated.environment import ENVIRONMENTS
from targets.errors import MissingRequirementError

if TYPE_CHECKING:
    import numpy as np

    from calibration.spec import TensorSpec
    from exporters.capture import Captured
    from exporters.onnx import OnnxModel

    Arrays = Mapping[str, np.ndarray[Any, Any]]


class Form(StrEnum):
    """The forms of a model between the user's file and a measured build."""

    MODULE = "torch module"
    GRAPH = "exported graph"
    ONNX = "onnx model"
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
    """A file that a runtime loads, with those it needs beside it.

    A companion has the file's name with another ending, or a name of its own by which the file asks for it.
    """

    runtime: str
    file: Path
    precision: str
    delegated: Delegated | None
    companions: tuple[Path, ...] = ()


Observer = Literal["min-max", "percentile", "mse"]
GAIN_DB = 6.0
"""How much less noise a second attempt at int8 aims at: half the amplitude."""
CONTROLLED = "controlled"
"""The variant of int8 whose quantizer puts operators back to float until outputs agree. It takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How to quantize: the observer of activations, the modules that stay float, by path, and the variant.

    `reduce_range` asks for 7-bit weights, where products of 8 bits saturate; `signed_activations` for what
    Arm's kernels take; `transformer` for the quantizer's preset of that kind; `least_snr_db` is what outputs
    must reach, for a variant that looks at them.
    """

    observer: Observer = "min-max"
    keep_float: tuple[str, ...] = ()
    variant: str = ""
    reduce_range: bool = False
    signed_activations: bool = False
    transformer: bool = False
    least_snr_db: float = 0.0


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
        source: "Captured | OnnxModel",
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
        self,
        file: Path,
        *,
        inputs: "Sequence[TensorSpec]",
        outputs: Sequence[str],
        threads: int,
        spinning: bool = True,
    ) -> Session:
        """Loads an artifact. Raises IntegrityError when the file is none.

        `spinning` allows threads to spin while they wait, where the runtime does: quick between calls that
        follow each other, a waste of the CPU in a server that waits for requests.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the table: where the exporter is, the form it starts from, what it needs and offers.

    `packages` is what a build takes, `runs_on` what running an artifact takes; `int8` holds the variants of
    static int8 it can make, each with the packages that this takes; those in `controlled` have a
    controlled one too, tried where they cost too much accuracy. An isolated runtime runs in an
    environment of its own (exporters/isolated); `dense_twin` is the function that fills an artifact's masked
    weights, to time its zeros against.
    """

    attribute: str
    accepts: Form
    extra: str
    packages: tuple[str, ...]
    runs_on: tuple[str, ...]
    int8: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    controlled: tuple[str, ...] = ()
    dynamic_int8: bool = False
    weight_int4: bool = False
    isolated: bool = False
    dense_twin: str = ""

    @property
    def competes(self) -> bool:
        """Whether an artifact runs without torch: what needs it stands aside where others do not."""
        return "torch" not in self.runs_on

    @property
    def serves(self) -> bool:
        """Whether a server may open an artifact in its own process, and a package hold all that it takes."""
        return self.competes and not self.isolated


TORCH = ("torch", "torchao", "safetensors", "torch_pruning")

EXPORTERS: dict[str, Entry] = {
    "executorch": Entry(
        attribute="exporters.executorch:ExecuTorchExporter",
        accepts=Form.GRAPH,
        extra="executorch",
        packages=(*TORCH, "executorch"),
        runs_on=("torch", "executorch"),
        dynamic_int8=True,
    ),
    "onnxruntime": Entry(
        attribute="exporters.onnxruntime:OnnxRuntimeExporter",
        accepts=Form.ONNX,
        extra="onnx",
        packages=(*TORCH, "onnx", "onnxscript", "onnxruntime"),
        runs_on=("onnxruntime",),
        dynamic_int8=True,
        weight_int4=True,
    ),
    "openvino": Entry(
        attribute="exporters.openvino:OpenVinoExporter",
        accepts=Form.ONNX,
        extra="openvino",
        packages=(*TORCH, "onnx", "onnxscript", "openvino", "nncf"),
        runs_on=("openvino",),
        int8={"": (), "qdq": ("onnxruntime",)},
        controlled=("",),
    ),
    "deepsparse": Entry(
        attribute="exporters.deepsparse:DeepSparseExporter",
        accepts=Form.ONNX,
        extra="onnx",
        packages=(*TORCH, "onnx", "onnxscript", "onnxruntime"),
        runs_on=(),
        isolated=True,
        dense_twin="exporters.deepsparse:dense_twin",
    ),
}


def int8_variants(runtime: str) -> tuple[str, ...]:
    """The kinds of static int8 that a runtime's exporter can make with the packages at hand."""
    return tuple(name for name, needs in EXPORTERS[runtime].int8.items() if not _absent(needs))


def missing_packages(runtime: str) -> tuple[str, ...]:
    """The packages this environment lacks for a runtime, without importing any."""
    return _absent(EXPORTERS[runtime].packages)


def at_hand(runtime: str) -> bool:
    """Whether this version and machine can build for a runtime."""
    entry = EXPORTERS.get(runtime)
    if entry is None or missing_packages(runtime):
        return False
    return not entry.isolated or ENVIRONMENTS[runtime].possible


def _absent(packages: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in packages if find_spec(name) is None)


def require_packages(runtime: str) -> None:
    """Raises MissingRequirementError, with the command that installs it, for what a runtime lacks here."""
    _require(runtime, missing_packages(runtime), "exporter")


def find_exporter(runtime: str) -> Exporter:
    """The exporter of a runtime, its libraries loaded. Raises as `require_packages`."""
    require_packages(runtime)
    return _imported(runtime)


def find_runtime(runtime: str) -> Exporter:
    """The exporter of a runtime, to open artifacts with: what only a build takes may be absent.

    Raises MissingRequirementError where the runtime itself is.
    """
    if runtime not in EXPORTERS:
        raise MissingRequirementError(
            "the artifact cannot be opened",
            found=f"the runtime {runtime!r}",
            expected=f"one of {', '.join(EXPORTERS)}",
            fix="use the edge-deploy version that made it",
        )
    _require(runtime, _absent(EXPORTERS[runtime].runs_on), "runtime")
    return _imported(runtime)


def _require(runtime: str, lacking: Sequence[str], part: str) -> None:
    if lacking:
        extra = EXPORTERS[runtime].extra
        raise MissingRequirementError(
            f"the {runtime} {part} cannot run",
            found=f"no package {', '.join(lacking)}",
            expected=f"the extra {extra!r}",
            fix=f"pip install 'edge-deploy[{extra}]'",
        )


def dense_twin(runtime: str, file: Path, twin: Path) -> None:
    """Writes an artifact with the zeros of its weights filled, by the function that its entry names."""
    _attribute(EXPORTERS[runtime].dense_twin)(file, twin)


def _imported(runtime: str) -> Exporter:
    exporter: Exporter = _attribute(EXPORTERS[runtime].attribute)()
    return exporter


def _attribute(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
