"""deploy.toml as a value: parsed, checked, with every unknown key refused and the nearest named."""

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from calibration.spec import DTYPES, TensorSpec
from targets.errors import UsageError, nearest

LARGEST_FILE_BYTES = 1 << 20
LARGEST_NUMBER = 10**15
DOTTED = re.compile(r"""[\w"'-]++(?:\s*+\.\s*+[\w"'-]++)*+""")
MOST_DOTS = 100
LONGEST_NAME = 100
LONGEST_SHOWN = 120
MOST_ENTRIES = 10**9
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int8-dynamic", "int4")


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

    def unread(self) -> list[str]:
        """Keys of the contract that are set and that nothing in this version acts on."""
        tables = self.tables
        given = {
            "budget.speedup": tables.budget.speedup,
            "recover.on_miss": tables.recover and tables.recover.on_miss,
            "calibration.tokenizer": tables.calibration and tables.calibration.tokenizer,
            "evaluate.tokenizer": tables.evaluate and tables.evaluate.tokenizer,
        }
        return [key for key, value in given.items() if value]

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
    file = Path(os.path.abspath(path / "deploy.toml" if path.is_dir() else path))
    try:
        text = _text(file, path)
        if max((found[0].count(".") for found in DOTTED.finditer(text)), default=0) > MOST_DOTS:
            raise RecursionError  # the parser's time grows with the square of the parts
        project = Project(file=file, tables=check(_with_inputs(tomllib.loads(text), file), origin=file.name))
    except RecursionError as error:
        raise UsageError(
            f"{file.name} is nested too deeply",
            expected="tables and lists of a few levels",
            fix="remove the nesting",
        ) from error
    except ValueError as error:  # also a number of more digits than Python reads
        raise UsageError(
            f"{file.name} does not parse: {error}", expected="TOML 1.0", fix="correct the line it names"
        ) from error
    _check_name(project)
    _check_targets(project)
    return project


def _with_inputs(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """The tables with the inputs that a Hugging Face folder or an ONNX file implies, without [inputs]."""
    model = data.get("model")
    source = model.get("source") if isinstance(model, dict) else None
    if data.get("inputs") or not isinstance(source, str) or "\0" in source:
        return data
    from deploy import foreign, huggingface

    folder = file.parent / source
    if foreign.is_model(folder):
        return {**data, "inputs": foreign.default_inputs(folder)}
    return {**data, "inputs": huggingface.default_inputs(folder)} if huggingface.is_folder(folder) else data


def _text(file: Path, named: Path) -> str:
    """The file's text, when it is a regular file of a sensible size."""
    try:
        if file.exists() and not file.is_file():
            raise UsageError(
                f"{named} is no regular file", expected="a deploy.toml", fix="name it with --config"
            )
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE_BYTES + 1)
        if len(content) > LARGEST_FILE_BYTES:
            raise UsageError(
                f"{file.name} is too large",
                expected=f"at most {LARGEST_FILE_BYTES} bytes",
                fix="name a deploy.toml",
            )
        return content.decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"{named} cannot be read",
            found=error.strerror,
            expected="a deploy.toml",
            fix="run deploy init MODEL to write one, or name it with --config",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file.name} is not text",
            found=f"byte {content[error.start]:#04x} at {error.start}",
            expected="UTF-8",
            fix="save it as UTF-8",
        ) from error


def check(data: Mapping[str, Any], *, origin: str) -> ProjectTables:
    """The tables as a value. Raises UsageError naming the key, the value and what fits."""
    _refuse_unknown(data, ProjectTables, (), origin)
    for path, text in _strings(data, ()):
        _check_string(path, text, origin)
    try:
        tables = msgspec.convert(data, ProjectTables)
    except msgspec.ValidationError as error:
        raise _wrong_type(error, data, origin) from error
    for path, value in _numbers(msgspec.to_builtins(tables), ()):
        _check_number(path, value, origin)
    if not tables.inputs:
        raise UsageError(
            f"{origin} declares no input",
            expected="a table [inputs.NAME] with the shape of each input of the model",
            fix='for example [inputs.image] shape = ["batch", 3, 224, 224]',
        )
    for name, table in tables.inputs.items():
        _check_input(name, table, origin)
    for precision in tables.parity.min_snr_db:
        if precision not in PRECISIONS:
            raise _unknown_word(f"{origin}: parity.min_snr_db names no precision", precision, PRECISIONS)
    for name, overrides in tables.target.items():
        merged = merge({**msgspec.to_builtins(tables), "target": {}}, overrides)
        if "target" in overrides or "model" in overrides:
            raise UsageError(
                f"{origin}: [target.{name}] may not hold [model] or [target]",
                found=", ".join(overrides),
                expected="inputs, calibration, prune, quantize, budget and the like",
                fix="move it out of [target]",
            )
        check(merged, origin=f"{origin}, [target.{name}]")
    return tables


def _check_name(project: Project) -> None:
    """The model's name becomes a folder: it must be one part of a path."""
    name = project.name
    if (
        name in ("", ".", "..")
        or any(mark in name for mark in "/\\")
        or len(os.fsencode(name)) > LONGEST_NAME
    ):
        raise UsageError(
            f"{project.file.name}: model.name is no name for a folder",
            found=_short(name),
            expected=f"1 to {LONGEST_NAME} bytes without / and \\",
            fix="set [model] name",
        )


def _check_targets(project: Project) -> None:
    """Every [target.NAME] must be one that for_target asks for; another would be passed over in silence."""
    if not project.tables.target:
        return
    from targets.catalog import find

    for name in project.tables.target:
        target = find(name, project_folder=project.folder)
        names = (target.name, *(chip.name for chip in target.chips))
        if name not in names:
            raise UsageError(
                f"{project.file.name}: [target.{name}] is not called by its catalogue name",
                found=_short(name),
                expected=" or ".join(names),
                fix=f"write [target.{target.name}]",
            )


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
            raise _unknown_word(f"{origin} has an unknown key in {where}", key, sorted(fields))
        _refuse_unknown(value, fields[key], (*path, key), origin)


def _unknown_word(what: str, word: str, known: Sequence[str]) -> UsageError:
    close = nearest(word[:LONGEST_SHOWN], list(known), 1)[0]
    return UsageError(
        what, found=_short(word), expected=f"one of {', '.join(known)}", fix=f"did you mean {close!r}?"
    )


def _short(value: object) -> str:
    """A value as Python writes it, cut where it is too long for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    candidates = (kind, *getattr(kind, "__args__", ()))
    if getattr(kind, "__origin__", None) in (dict, list):
        return None
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, msgspec.Struct)), None)


def _mapping_value(kind: Any) -> Any:
    arguments: tuple[Any, ...] = getattr(kind, "__args__", ())
    return arguments[1] if getattr(kind, "__origin__", None) is dict and len(arguments) == 2 else object


def _wrong_type(error: msgspec.ValidationError, data: Mapping[str, Any], origin: str) -> UsageError:
    """msgspec's message with the key as a person writes it, the value that was found, and what fits."""
    text, _, where = str(error).partition(" - at `$")
    text = text.replace("Object", "the table").replace(" | null", "")
    pattern = [step for step in where.rstrip("`").replace("[...]", ".*").split(".") if step]
    places = list(_places(data, pattern, ()))
    keys, value = next(
        (place for place in places if _is_meant(place[1], text)), places[0] if places else ((), None)
    )
    wanted = re.search("Expected (.*), got", text)
    choices = _choices(ProjectTables, keys)
    return UsageError(
        f"{origin}: {'.'.join(keys) or 'the top level'} does not fit: {text[: 2 * LONGEST_SHOWN]}",
        found=_short(value) if value is not None and keys else None,
        expected=choices or (TYPE_WORDS.get(wanted[1].strip("`"), wanted[1]) if wanted else "a whole table"),
        fix=_fix_of_type(value, data),
    )


TYPE_WORDS = {"str": "text in quotes", "int": "a whole number", "float": "a number", "array": "a list [...]",
              "object": "a table", "bool": "true or false"}  # fmt: skip
KINDS = {"str": str, "int": int, "float": float, "array": list, "object": dict, "bool": bool}


def _places(
    data: Any, pattern: Sequence[str], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values where msgspec's path may point; * stands for any key of a table or entry of a list."""
    if not pattern:
        yield path, data
    elif isinstance(data, list) and pattern[0] == "*":
        for value in data:
            yield from _places(value, pattern[1:], path)
    elif isinstance(data, Mapping):
        for key in data if pattern[0] == "*" else [pattern[0]]:
            if key in data:
                yield from _places(data[key], pattern[1:], (*path, key))


def _is_meant(value: object, text: str) -> bool:
    got = re.search("got `(.*?)`", text)
    if got:
        return type(value) is KINDS.get(got[1])
    return isinstance(value, str) and repr(value) in text


def _choices(kind: Any, keys: Sequence[str]) -> str | None:
    """The words that a key takes, where it takes only some."""
    for key in keys:
        struct = _struct_in(kind)
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)} if struct else {}
        kind = fields.get(key, _mapping_value(kind))
    words = [word for part in (kind, *get_args(kind)) for word in get_args(part) if isinstance(word, str)]
    return ", ".join(dict.fromkeys(words)) or None


def _fix_of_type(value: object, data: Mapping[str, Any]) -> str:
    if "model" not in data:
        return "start with [model] and its source; deploy init MODEL writes a whole deploy.toml"
    if isinstance(value, str) and value.lstrip("+-.")[:1].isdigit():
        return "a number stands without quotes and without its unit, which the key's name holds"
    return "correct the value, or remove the key"


def _numbers(data: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int | float]]:
    if isinstance(data, Mapping):
        return [found for key, value in data.items() for found in _numbers(value, (*path, str(key)))]
    if isinstance(data, list):
        return [found for value in data for found in _numbers(value, path)]
    is_number = isinstance(data, int | float) and not isinstance(data, bool)
    return [(path, data)] if is_number else []


def _strings(data: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Every text value, and every key as a value of its own table."""
    if isinstance(data, Mapping):
        keys = [(path, str(key)) for key in data]
        return keys + [found for key, value in data.items() for found in _strings(value, (*path, str(key)))]
    if isinstance(data, list):
        return [found for value in data for found in _strings(value, path)]
    return [(path, data)] if isinstance(data, str) else []


def _check_string(path: tuple[str, ...], text: str, origin: str) -> None:
    """No system call takes a NUL, and an empty path would name the folder itself."""
    key = ".".join(path) or "the top level"
    if "\0" in text:
        raise UsageError(
            f"{origin}: {key} holds a NUL",
            found=_short(text),
            expected="text without \\u0000",
            fix="remove it",
        )
    if not text.strip() and path:
        raise UsageError(
            f"{origin}: {key} is empty",
            found=_short(text),
            expected="a name or a value",
            fix="remove the key, or give it a value",
        )


POSITIVE = {
    "latency_ms", "first_token_ms", "speedup", "size_mb", "peak_memory_mb", "samples", "batch_size",
    "learning_rate", "min_channels", "min", "max", "height", "width", "sample_rate", "frame", "hop", "bands",
    "fft", "floor", "std",
}  # fmt: skip
NOT_NEGATIVE = {"max_drop", "max_drop_relative", "epochs", "low_hz"}


def _check_number(path: tuple[str, ...], value: int | float, origin: str) -> None:
    key = path[-1]
    wanted = None
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        wanted = f"a number below {LARGEST_NUMBER:.0e}"
    elif not math.isfinite(value):
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
        fix = "correct the value, or remove the key"
        if key == "sparsity":
            fix = 'leave the table out, or set pattern = "none", to prune nothing'
        raise UsageError(
            f"{origin}: {'.'.join(path)} is out of range", found=_short(value), expected=wanted, fix=fix
        )


def _check_input(name: str, table: InputTable, origin: str) -> None:
    where = f"{origin}: inputs.{name}"
    if table.dtype not in DTYPES:
        raise _unknown_word(f"{where}.dtype is unknown", table.dtype, DTYPES)
    if not table.shape:
        raise UsageError(
            f"{where}.shape is empty",
            found="[]",
            expected="at least the batch dimension",
            fix='for example shape = ["batch", 3, 224, 224]',
        )
    if any(isinstance(size, int) and size <= 0 for size in table.shape):
        raise UsageError(
            f"{where}.shape is out of range",
            found=table.shape,
            expected="sizes above 0 or names",
            fix="correct the shape",
        )
    named = {size for size in table.shape if isinstance(size, str)}
    for dimension, bounds in table.dynamic.items():
        if dimension not in named:
            raise UsageError(
                f"{where}.dynamic names no dimension of its shape",
                found=repr(dimension),
                expected=", ".join(sorted(named)) or "no dynamic dimension",
                fix=f"write the name into inputs.{name}.shape, or remove it here",
            )
        if bounds.min > bounds.max:
            raise UsageError(
                f"{where}.dynamic.{dimension} is out of range",
                found=f"min {bounds.min}, max {bounds.max}",
                expected="min at most max",
                fix="exchange them",
            )
    sizes = (size if isinstance(size, int) else table.dynamic.get(size, Bounds()).max for size in table.shape)
    if (entries := math.prod(sizes)) > MOST_ENTRIES:
        raise UsageError(
            f"{where} is too large",
            found=f"{float(entries):.3g} numbers at the largest size of each dimension",
            expected=f"at most {MOST_ENTRIES:.0e}",
            fix="lower dynamic.NAME.max, or correct the shape",
        )
