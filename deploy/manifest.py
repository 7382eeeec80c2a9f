"""The contract between a build and everything after it: manifest.json, plan.json, report.json.

The structs are the schema: `schema()` generates the JSON Schema that docs/ publishes, and `read`
refuses a major version it does not know.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from targets.errors import IntegrityError, UsageError

SCHEMA_VERSION = "1.0"

Verdict = Literal["met", "missed", "uncertain", "unmeasured"]
ChosenBy = Literal["device", "estimate", "host-proxy"]


class Value(msgspec.Struct, frozen=True):
    """A value of the contract."""


class File(Value, frozen=True, kw_only=True):
    """A file of the build, its path relative to the manifest."""

    path: str
    role: str
    size_bytes: int
    sha256: str


class Input(Value, frozen=True, kw_only=True):
    """An input as the artifact takes it; `dynamic` maps a named dimension to [smallest, largest]."""

    name: str
    shape: list[int | str]
    dtype: str
    dynamic: dict[str, list[int]] = {}
    preprocess: dict[str, Any] = {}


class Output(Value, frozen=True, kw_only=True):
    """An output as the artifact gives it."""

    name: str
    shape: list[int | str]
    dtype: str
    labels: str | None = None


class Recommended(Value, frozen=True, kw_only=True):
    """How to run the artifact for the latency that was measured.

    `shared_rows` is how many rows of different requests should share a call: 1 where rows depend on each
    other or nothing is gained, None where that was not measured.
    """

    threads: int
    batch: int
    shared_rows: int | None = None


class Machine(Value, frozen=True, kw_only=True):
    """Where a latency was measured."""

    kind: str
    name: str
    cpu: str


class Accuracy(Value, frozen=True, kw_only=True):
    """The metric of one rung and its drop against the dense float model on the same samples.

    `value` and the rest are null where nothing was measured; `reason` then says why.
    """

    metric: str | None
    value: float | None
    drop: float | None
    drop_ci95: list[float] | None
    samples: int
    verdict: Verdict
    reason: str | None = None
    direction: Literal["max", "min"] = "max"
    samples_needed: int | None = None


class Parity(Value, frozen=True, kw_only=True):
    """How the artifact's outputs compare with the module it was made from, on real inputs."""

    reference: str
    samples: int
    snr_db: float
    max_abs_error: float
    top1_agreement: float | None
    input_sensitive: bool
    batches: list[int] = []
    min_snr_db: float | None = None


class Latency(Value, frozen=True, kw_only=True):
    """Milliseconds for one call at the recommended batch; null fields come with a reason."""

    median_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    ci95_ms: list[float] | None
    samples: int
    threads: int
    measured_on: Machine | None
    reason: str | None = None


class Throughput(Value, frozen=True, kw_only=True):
    """Samples a second with its 95% interval, at the batch and threads that gave the most."""

    samples_per_s: float
    ci95: list[float]
    batch: int
    threads: int


class SparseExecution(Value, frozen=True, kw_only=True):
    """That zeros are skipped: how much faster a rung ran than the same graph with dense weights.

    `gain` is the ratio of interleaved medians with its 95% interval, at this batch.
    """

    gain: float
    ci95: list[float]
    batch: int


class LeftOut(Value, frozen=True, kw_only=True):
    """An operator the delegate did not take."""

    operator: str
    module: str
    why: str


class Delegation(Value, frozen=True, kw_only=True):
    """How much of the graph runs in the delegate."""

    delegate: str
    operators: int
    delegated: int
    left: list[LeftOut] = []


class Rung(Value, frozen=True, kw_only=True):
    """One candidate of the ladder, measured. `dropped` says why it cannot ship, else null."""

    name: str
    pattern: str
    precision: str
    sparsity: float
    parameters: int
    macs: int
    size_bytes: int | None
    accuracy: Accuracy
    parity: Parity | None
    latency: Latency
    peak_memory_bytes: int | None
    delegation: Delegation | None
    reason: str
    dropped: str | None = None
    throughput: Throughput | None = None
    sparse_execution: SparseExecution | None = None


class BudgetLine(Value, frozen=True, kw_only=True):
    """One limit of the budget and what became of it; `how` is the command that would settle it."""

    name: str
    limit: float
    value: float | None
    verdict: Verdict
    how: str | None = None


class Environment(Value, frozen=True, kw_only=True):
    """What the build ran on."""

    packages: dict[str, str]
    python: str
    os: str
    cpu: str


class Provenance(Value, frozen=True, kw_only=True):
    """Hashes of what went in; null where there was none."""

    model_sha256: str | None
    calibration_sha256: str | None
    config_sha256: str
    seed: int
    evaluation_sha256: str | None = None


class Manifest(Value, frozen=True, kw_only=True):
    """What a build ships and how it was judged."""

    schema_version: str = SCHEMA_VERSION
    model: str
    target: str
    chip: str
    created_at: str
    runtime: str
    precision: str
    shipped_rung: str
    chosen_by: ChosenBy
    fallback: str | None
    files: list[File]
    inputs: list[Input]
    outputs: list[Output]
    recommended: Recommended
    rungs: list[Rung]
    budget: list[BudgetLine]
    licences: list[str]
    environment: Environment
    provenance: Provenance
    warnings: list[str] = []


class PlanStep(Value, frozen=True, kw_only=True):
    """A step of the plan; its neighbours' forms fit."""

    name: str
    accepts: str
    produces: str
    reason: str


class Refusal(Value, frozen=True, kw_only=True):
    """Something the plan does not do, why, and what it does instead."""

    what: str
    reason: str
    instead: str


class PlanRecord(Value, frozen=True, kw_only=True):
    """plan.json: what will be done for a target, with the reason for each step."""

    schema_version: str = SCHEMA_VERSION
    model: str
    target: str
    chip: str
    runtime: str
    pattern: str
    precision: str
    steps: list[PlanStep]
    rungs: list[str]
    refused: list[Refusal]
    notes: list[str] = []


class LayerWidths(Value, frozen=True, kw_only=True):
    """Output channels of one layer before and after pruning."""

    layer: str
    kind: str
    before: int
    after: int


class LayerWeights(Value, frozen=True, kw_only=True):
    """The weights of one layer, and how many of them a mask set to zero."""

    layer: str
    kind: str
    weights: int
    zeros: int


class LayerSensitivity(Value, frozen=True, kw_only=True):
    """Output SNR in dB when this layer alone is quantized, on calibration data."""

    layer: str
    snr_db: float
    kept_float: bool


class Asked(Value, frozen=True, kw_only=True):
    """What a compression step was asked for (null: nothing) and what it achieved."""

    quantity: str
    asked: float | None
    achieved: float
    note: str = ""


class Stage(Value, frozen=True, kw_only=True):
    """How long a stage took; cached stages took no work."""

    name: str
    seconds: float
    cached: bool
    why: str


class RecoveryPoint(Value, frozen=True, kw_only=True):
    """An epoch of recovery: the training loss and the score on held-out training data."""

    epoch: int
    loss: float
    score: float


class Report(Value, frozen=True, kw_only=True):
    """report.json: the manifest and everything behind it that a person may want to see."""

    schema_version: str = SCHEMA_VERSION
    manifest: Manifest
    plan: PlanRecord
    widths: list[LayerWidths] = []
    masks: list[LayerWeights] = []
    pruning: list[Asked] = []
    sensitivity: list[LayerSensitivity] = []
    recovery: list[RecoveryPoint] = []
    runner_up: str | None = None
    report_accuracy: Accuracy | None = None
    stages: list[Stage] = []


class Measurement(Value, frozen=True, kw_only=True):
    """measurements/*.json: a build looked at again, on one device."""

    schema_version: str = SCHEMA_VERSION
    created_at: str
    rung: str
    device: str
    golden_snr_db: float
    golden_max_abs_error: float
    latency: Latency
    peak_memory_bytes: int


def encode(value: Value) -> bytes:
    """Indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def schema(kind: type[Value] = Manifest) -> dict[str, Any]:
    """The JSON Schema of one of the structs."""
    return msgspec.json.schema(kind)


def read(path: Path) -> Manifest:
    """The manifest of a build folder or of a manifest file.

    Raises UsageError when there is none and IntegrityError when it is damaged or of another major version.
    """
    file = path / "manifest.json" if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no build at {path}",
            found=error.strerror,
            expected="a folder that holds manifest.json",
            fix="name the folder that deploy build printed",
        ) from error
    return decode(data, origin=str(file))


def decode(data: bytes, *, origin: str) -> Manifest:
    """A manifest from its bytes; `origin` names them in errors."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise IntegrityError(
                f"{origin} has an unknown schema version",
                found=version,
                expected=f"{SCHEMA_VERSION.split('.')[0]}.x",
                fix="use the edge-deploy version that made this build, or build again",
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise IntegrityError(f"{origin} is damaged: {error}", fix="build again") from error


class _Versioned(msgspec.Struct):
    schema_version: str
