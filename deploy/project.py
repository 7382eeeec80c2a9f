"""deploy.toml as a value: parsed, checked, with every unknown key refused and the nearest named."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from calibration.spec import DTYPES, TensorSpec
from targets.errors import UsageError, nearest


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of deploy.toml."""


class Bounds(Table, frozen=True, kw_only=True):
    """The smallest and largest size of a named dimension."""

    min: int = 1
    max: int = 64


class Resize(Table, frozen=True, kw_only=True):
    """Bilinear resizing with half-pixel centres."""

    height: int
    width: int


class LogMel(Table, frozen=True, kw_only=True):
    """Samples of sound to a log-mel picture (frames, bands)."""

    sample_rate: int
    frame: int
    hop: int
    bands: int
    fft: int | None = None
    low_hz: float = 0.0
    high_hz: float | None = None
    floor: float = 1e-6


class Preprocess(Table, frozen=True, kw_only=True):
    """What is done to raw data, in this order, before the model sees it."""

    log_mel: LogMel | None = msgspec.field(default=None, name="log-mel")
    layout: Literal["nhwc-to-nchw"] | None = None
    resize: Resize | None = None
    crop: Resize | None = None
    scale: float | None = None
    mean: float | list[float] | None = None
    std: float | list[float] | None = None


class InputTable(Table, frozen=True, kw_only=True):
    """[inputs.NAME]"""

    shape: list[int | str]
    dtype: str = "float32"
    dynamic: dict[str, Bounds] = {}
    preprocess: Preprocess | None = None


class OutputTable(Table, frozen=True, kw_only=True):
    """[outputs.NAME]"""

    labels: str | None = None


class ModelTable(Table, frozen=True, kw_only=True):
    """[model]"""

    source: str
    name: str | None = None
    weights: str | None = None


class DataTable(Table, frozen=True, kw_only=True):
    """[calibration] and [report]"""

    source: str
    samples: int | None = None
    tokenizer: str | None = None


class EvaluateTable(Table, frozen=True, kw_only=True):
    """[evaluate]"""

    source: str
    metric: str = "accuracy"
    direction: Literal["max", "min"] = "max"
    max_drop: float | None = None
    max_drop_relative: float | None = None
    accept: Literal["estimate", "proven"] = "estimate"
    samples: int | None = None
    tokenizer: str | None = None


class RecoverTable(Table, frozen=True, kw_only=True):
    """[recover]"""

    source: str
    epochs: int = 2
    learning_rate: float | None = None
    batch_size: int = 64
    samples: int | None = None
    on_miss: list[Literal["recover", "gentler"]] = []


class PruneTable(Table, frozen=True, kw_only=True):
    """[prune]"""

    pattern: str = "auto"
    method: str = "auto"
    criterion: str = "auto"
    sparsity: float | None = None
    of: Literal["macs", "parameters"] = "macs"
    ranking: Literal["global", "local"] = "global"
    min_channels: int = 8
    exclude: list[str] = []


class QuantizeTable(Table, frozen=True, kw_only=True):
    """[quantize]"""

    precision: str = "auto"
    observer: Literal["min-max", "percentile", "mse"] = "min-max"
    exclude: list[str] = []


class BudgetTable(Table, frozen=True, kw_only=True):
    """[budget]"""

    latency_ms: float | None = None
    latency_percentile: float = 50.0
    first_token_ms: float | None = None
    speedup: float | None = None
    size_mb: float | None = None
    peak_memory_mb: float | None = None


class ParityTable(Table, frozen=True, kw_only=True):
    """[parity]"""

    min_snr_db: dict[str, float] = {}


class ProjectTables(Table, frozen=True, kw_only=True):
    """deploy.toml"""

    model: ModelTable
    inputs: dict[str, InputTable] = {}
    outputs: dict[str, OutputTable] = {}
    calibration: DataTable | None = None
    evaluate: EvaluateTable | None = None
    report: DataTable | None = None
    recover: RecoverTable | None = None
    prune: PruneTable = PruneTable()
    quantize: QuantizeTable = QuantizeTable()
    budget: BudgetTable = BudgetTable()
    parity: ParityTable = ParityTable()
    target: dict[str, dict[str, Any]] = {}


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A deploy.toml that was read and checked, with where it lies."""

    file: Path
    tables: ProjectTables

    @property
    def folder(self) -> Path:
        """What the paths of deploy.toml are relative to."""
        return self.file.parent

    @property
    def name(self) -> str:
        """The model's name: deploy.toml's, else the folder's."""
        return self.tables.model.name or self.folder.name

    def path(self, relative: str) -> Path:
        """A path of deploy.toml, made absolute."""
        return self.folder / relative

    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs in the order of deploy.toml."""
        return tuple(_spec(name, table) for name, table in self.tables.inputs.items())

    def for_target(self, *names: str) -> "Project":
        """The project with the tables of [target.NAME] laid over, for any of these names."""
        data = msgspec.to_builtins(self.tables)
        for name in names:
            data = merge(data, self.tables.target.get(name, {}))
        return self.with_tables({**data, "target": {}})

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> "Project":
        """The project with flags laid over deploy.toml; None leaves a key as it is."""
        given = {
            table: {key: value for key, value in keys.items() if value is not None}
            for table, keys in changes.items()
        }
        given = {table: keys for table, keys in given.items() if keys}
        return self.with_tables(merge(msgspec.to_builtins(self.tables), given)) if given else self

    def with_tables(self, data: Mapping[str, Any]) -> "Project":
        """The project with other tables, checked like a file."""
        return Project(file=self.file, tables=check(data, origin=self.file.name))


def load(path: Path) -> Project:
    """Reads deploy.toml, or the one in a folder. Raises UsageError for whatever does not fit."""
    file = (path / "deploy.toml" if path.is_dir() else path).absolute()
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read",
            found=error.strerror,
            expected="a deploy.toml",
            fix="run deploy init MODEL to write one, or name it with --config",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file.name} is not text", found=f"byte {error.start}", expected="UTF-8") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file.name} does not parse: {error}", expected="TOML 1.0") from error
    return Project(file=file, tables=check(data, origin=file.name))


def check(data: Mapping[str, Any], *, origin: str) -> ProjectTables:
    """The tables as a value. Raises UsageError naming the key, the value and what fits."""
    _refuse_unknown(data, ProjectTables, (), origin)
    try:
        tables = msgspec.convert(data, ProjectTables)
    except msgspec.ValidationError as error:
        raise _wrong_type(error, data, origin) from error
    for path, value in _numbers(msgspec.to_builtins(tables), ()):
        _check_number(path, value, origin)
    for name, table in tables.inputs.items():
        _check_input(name, table, origin)
    for name, overrides in tables.target.items():
        merged = merge({**msgspec.to_builtins(tables), "target": {}}, overrides)
        if "target" in overrides or "model" in overrides:
            raise UsageError(f"{origin}: [target.{name}] may not hold [model] or [target]")
        check(merged, origin=f"{origin}, [target.{name}]")
    return tables


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables laid over tables, key by key; an empty base table stands for a missing one."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
        )
    return merged


def _spec(name: str, table: InputTable) -> TensorSpec:
    named = [size for size in table.shape if isinstance(size, str)]
    bounds = {size: table.dynamic.get(size, Bounds()) for size in named}
    return TensorSpec(
        name=name,
        shape=tuple(table.shape),
        dtype=table.dtype,
        bounds={size: (bound.min, bound.max) for size, bound in bounds.items()},
    )


def _refuse_unknown(data: object, kind: Any, path: tuple[str, ...], origin: str) -> None:
    """Walks data beside its struct and refuses the first key that the struct lacks."""
    if not isinstance(data, Mapping):
        return
    struct = _struct_in(kind)
    if struct is None:
        value_kind = _mapping_value(kind)
        for key, value in data.items():
            _refuse_unknown(value, value_kind, (*path, key), origin)
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in data.items():
        if key not in fields:
            where = f"[{'.'.join(path)}]" if path else "the top level"
            raise UsageError(
                f"{origin} has an unknown key in {where}",
                found=repr(key),
                expected=f"one of {', '.join(sorted(fields))}",
                fix=f"did you mean {nearest(key, list(fields), 1)[0]!r}?",
            )
        _refuse_unknown(value, fields[key], (*path, key), origin)


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    candidates = (kind, *getattr(kind, "__args__", ()))
    if getattr(kind, "__origin__", None) in (dict, list):
        return None
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, msgspec.Struct)), None)


def _mapping_value(kind: Any) -> Any:
    arguments = getattr(kind, "__args__", ())
    return arguments[1] if getattr(kind, "__origin__", None) is dict and len(arguments) == 2 else object


def _wrong_type(error: msgspec.ValidationError, data: Mapping[str, Any], origin: str) -> UsageError:
    """msgspec's message with the key as a person writes it and the value that was found."""
    text, _, where = str(error).partition(" - at `$")
    keys = [key for key in where.rstrip("`").replace("[...]", "").split(".") if key]
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return UsageError(
        f"{origin}: {'.'.join(keys) or 'the top level'} does not fit: {text.replace('Object', 'the table')}",
        found=repr(value) if value is not None and keys else None,
        fix="a number stands without its unit, which the key's name holds"
        if _looks_like_unit(value)
        else None,
    )


def _looks_like_unit(value: object) -> bool:
    return isinstance(value, str) and value[:1].isdigit()


def _numbers(data: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(data, Mapping):
        return [found for key, value in data.items() for found in _numbers(value, (*path, str(key)))]
    if isinstance(data, list):
        return [found for value in data for found in _numbers(value, path)]
    is_number = isinstance(data, int | float) and not isinstance(data, bool)
    return [(path, float(data))] if is_number else []


POSITIVE = {
    "latency_ms", "first_token_ms", "speedup", "size_mb", "peak_memory_mb", "samples", "batch_size",
    "learning_rate", "min_channels", "min", "max", "height", "width", "sample_rate", "frame", "hop", "bands",
    "fft", "floor", "std",
}  # fmt: skip
NOT_NEGATIVE = {"max_drop", "max_drop_relative", "epochs", "low_hz"}


def _check_number(path: tuple[str, ...], value: float, origin: str) -> None:
    key = path[-1]
    wanted = None
    if not math.isfinite(value):
        wanted = "a finite number"
    elif key == "sparsity" and not 0.0 < value < 1.0:
        wanted = "a fraction above 0 and below 1"
    elif key == "latency_percentile" and not 0.0 < value < 100.0:
        wanted = "a percentile between 0 and 100"
    elif key in POSITIVE and value <= 0:
        wanted = "a number above 0"
    elif key in NOT_NEGATIVE and value < 0:
        wanted = "0 or more"
    if wanted:
        fix = 'leave the table out, or set pattern = "none", to prune nothing' if key == "sparsity" else None
        raise UsageError(f"{origin}: {'.'.join(path)} is out of range", found=value, expected=wanted, fix=fix)


def _check_input(name: str, table: InputTable, origin: str) -> None:
    where = f"{origin}: inputs.{name}"
    if table.dtype not in DTYPES:
        close = nearest(table.dtype, list(DTYPES), 1)[0]
        raise UsageError(
            f"{where}.dtype is unknown",
            found=repr(table.dtype),
            expected=", ".join(DTYPES),
            fix=f"did you mean {close!r}?",
        )
    if any(isinstance(size, int) and size <= 0 for size in table.shape):
        raise UsageError(
            f"{where}.shape is out of range", found=table.shape, expected="sizes above 0 or names"
        )
    named = {size for size in table.shape if isinstance(size, str)}
    for dimension, bounds in table.dynamic.items():
        if dimension not in named:
            raise UsageError(
                f"{where}.dynamic names no dimension of its shape",
                found=repr(dimension),
                expected=", ".join(sorted(named)) or "no dynamic dimension",
            )
        if bounds.min > bounds.max:
            raise UsageError(
                f"{where}.dynamic.{dimension} is out of range",
                found=f"min {bounds.min}, max {bounds.max}",
                expected="min at most max",
            )
