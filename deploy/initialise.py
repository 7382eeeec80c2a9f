"""`deploy init`: looks at a model and what lies beside it, and writes a commented deploy.toml that builds."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from calibration import sources
from calibration.spec import TensorSpec
from deploy import foreign, huggingface, project
from targets.errors import DeployError, MissingRequirementError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from calibration.dataset import Dataset
    from deploy.inspection import Inspected

NAME = "deploy.toml"
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
DATA = (".npz",)
LABELS = ("labels.txt", "classes.txt", "label.txt")
ROLES = {
    "calibration": ("calib",),
    "report": ("report", "untouched", "holdout"),
    "evaluate": ("eval", "val", "test"),
    "recover": ("train",),
}
MOST_FILES = 50
MOST_JUDGED = 512
MOST_SYNTHETIC = 64
FEWEST_SAMPLES = 8
CLEAR_GAIN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialised:
    """A deploy.toml that was written (or, with dry_run, would be) and what a reader should know about it."""

    file: Path
    text: str
    source: str
    weights: str | None
    data: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def target(self) -> str:
        """A target to begin with: one whose first runtime can start from this model."""
        return _target(self.source)


@dataclass(slots=True, kw_only=True)
class _Findings:
    """What was found, piece by piece; mutable until the text is written."""

    folder: Path
    name: str
    source: str
    weights: str | None = None
    inspected: "Inspected | None" = None
    data: dict[str, str] = field(default_factory=dict)
    scale: float | None = None
    scale_why: str = ""
    labels: str | None = None
    classes: bool = False
    notes: list[str] = field(default_factory=list)


def initialise(
    model: str | Path | None = None,
    *,
    output: Path | None = None,
    inputs: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Initialised:
    """Writes a deploy.toml for "model.py:build", model.py or a Hugging Face folder.

    `output` is the file or its folder, by default beside model.py, or here for a folder. `inputs` are
    "name:shape:dtype" and spare the guessing. Raises UsageError when a deploy.toml is there and `force` is
    not given, ModelError when the model cannot be loaded or takes none of the guessed inputs.
    """
    _require_torch()
    path, attribute = _model_path(model)
    file = _output_file(path, output)
    if file.exists() and not force:
        raise UsageError(
            f"{file} is there already", expected="no file, which this would write", fix="use --force, or -o"
        )
    found = _inspect(path, attribute, file.parent, [parse_input(text) for text in inputs])
    text = _toml(found)
    project.check(_parsed(text), origin=NAME)
    if not dry_run:
        _write(file, text)
    return Initialised(
        file=file,
        text=text,
        source=found.source,
        weights=found.weights,
        data=dict(found.data),
        notes=tuple(found.notes),
    )


def parse_input(text: str) -> TensorSpec:
    """ "image:batch,3,32,32:float32" as a spec; the dtype may be left out, names are dynamic dimensions."""
    name, _, rest = text.partition(":")
    shape, _, dtype = rest.partition(":")
    sizes = [size.strip() for size in shape.replace("x", ",").split(",")] if _numeric(shape) else []
    sizes = sizes or [size.strip() for size in shape.split(",")]
    if not name or not all(sizes):
        raise UsageError(
            "--input does not fit",
            found=repr(text),
            expected="NAME:SHAPE:DTYPE",
            fix="for example --input image:batch,3,32,32:float32",
        )
    numbers = tuple(int(size) if size.lstrip("-").isdecimal() else size for size in sizes)
    table = {"shape": list(numbers), "dtype": dtype or "float32"}
    project.check({"model": {"source": "-"}, "inputs": {name: table}}, origin="--input")
    bounds = {size: (1, 64) for size in numbers if isinstance(size, str)}
    return TensorSpec(name=name, shape=numbers, dtype=dtype or "float32", bounds=bounds)


def _numeric(shape: str) -> bool:
    return all(part.strip().isdecimal() for part in shape.replace("x", ",").split(","))


def _require_torch() -> None:
    from importlib.util import find_spec

    lacking = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    if lacking:
        raise MissingRequirementError(
            "deploy init cannot load a model",
            found=f"no package {', '.join(lacking)}",
            expected="the extra 'executorch'",
            fix="pip install 'edge-deploy[executorch]'",
        )


def _model_path(model: str | Path | None) -> tuple[Path, str | None]:
    """The file or folder, absolute, and the factory's name where it was given."""
    if model is None:
        here = Path.cwd()
        if (here / "model.py").is_file():
            return here / "model.py", None
        if huggingface.is_folder(here):
            return here, None
        raise UsageError(
            "no model was named",
            found=f"neither model.py nor {huggingface.CONFIG} in {here}",
            expected="MODEL",
            fix="deploy init model.py:build, or a Hugging Face folder",
        )
    name, _, attribute = str(model).rpartition(".py:")
    path = Path(os.path.abspath(f"{name}.py" if name else model))
    if path.is_dir() and not huggingface.is_folder(path):
        path /= "model.py"
    if not path.exists():
        raise UsageError(
            f"{model} is missing",
            found=f"nothing at {path}",
            expected="model.py, model.py:factory or a Hugging Face folder",
            fix="correct the name",
        )
    if path.is_file() and path.suffix not in (".py", foreign.SUFFIX):
        raise UsageError(
            f"{path.name} is no model source",
            found=path.suffix or "no suffix",
            expected="the Python file that defines the model, a Hugging Face folder, or an ONNX model",
            fix="name the .py file; weights beside it are found",
        )
    return path, attribute if name else None


def _output_file(model: Path, output: Path | None) -> Path:
    """Where deploy.toml goes. The user's code must lie at or below its folder, so that changes are seen."""
    if output is None:
        return (model.parent if model.is_file() else Path.cwd()) / NAME
    file = Path(os.path.abspath(output))
    if file.suffix != ".toml":
        file /= NAME
    if not file.parent.is_dir():
        raise UsageError(
            f"{file.parent} is no folder", expected="a folder for deploy.toml", fix="make it first"
        )
    if model.is_file() and not model.resolve().is_relative_to(file.parent.resolve()):
        raise UsageError(
            "deploy.toml cannot lie there",
            found=f"{file.parent}, which does not hold {model.name}",
            expected="the model's own folder or one above it",
            fix=f"use -o {model.parent / NAME}",
        )
    return file


def _inspect(path: Path, attribute: str | None, folder: Path, given: Sequence[TensorSpec]) -> _Findings:
    from deploy.inspection import find_factory, inspect_model
    from deploy.model import run_factory

    relative = Path(os.path.relpath(path, folder)).as_posix()
    whole = path.is_dir() or foreign.is_model(path)  # brings its weights and says what its inputs are
    factory = f"{relative}:{attribute}" if attribute else relative
    source = factory if whole or attribute else find_factory(relative, folder)
    beside = path if path.is_dir() else path.parent
    found = _Findings(folder=folder, name=beside.resolve().name or "model", source=source)
    if whole and not given:
        given = _own_specs(path)
    module = (
        foreign.load_module(path, given) if foreign.is_model(path) else run_factory(source, folder).eval()
    )
    if not whole:
        module = _find_weights(found, beside) or module
    files = _data_files(found, beside)
    arrays = _arrays(found, files)
    found.inspected = inspect_model(module, folder, arrays=arrays, inputs=given)
    found.notes += found.inspected.notes
    _rename_only_input(found, arrays)
    _assign_data(found, files)
    found.classes = _finish_evaluation(found)
    if found.classes:
        _choose_scale(found, module)
    found.labels = _find_labels(found, beside)
    return found


def _own_specs(path: Path) -> tuple[TensorSpec, ...]:
    inputs = foreign.default_inputs(path) if foreign.is_model(path) else huggingface.default_inputs(path)
    tables = {"model": {"source": "-"}, "inputs": inputs}
    return project.Project(file=path / NAME, tables=project.check(tables, origin=NAME)).specs()


def _find_weights(found: _Findings, beside: Path) -> "nn.Module | None":
    """The module with the weights file that fits: safetensors and the newest first. None when none does."""
    from deploy.model import run_factory
    from deploy.weights import assign, load_weights

    files = [file for file in _listed(beside) if file.suffix in WEIGHTS]
    files.sort(key=lambda file: (WEIGHTS.index(file.suffix), -file.stat().st_mtime_ns))
    fitting: dict[str, nn.Module] = {}
    for file in files:
        name = _relative(file, found.folder)
        module = run_factory(found.source, found.folder).eval()
        try:
            assign(module, load_weights(file), origin=name)
        except DeployError as error:
            found.notes.append(f"{name} was left out: {error.what}")
            continue
        fitting[name] = module
    if not fitting:
        found.notes.append("no weights file fits: the factory's own weights are used")
        return None
    found.weights, *others = fitting
    if others:
        found.notes.append(f"{', '.join(others)} would fit too")
    return fitting[found.weights]


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())[:MOST_FILES]


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def _data_files(found: _Findings, beside: Path) -> dict[str, str]:
    """Data files by role, each role's first by the words that name it."""
    roles: dict[str, str] = {}
    files = [file for file in _listed(beside) if file.suffix in DATA]
    for _, name, role in sorted(_role(_relative(file, found.folder)) for file in files):
        # Validation data chooses; test data beside it only reports.
        taken = "report" if role == "evaluate" and role in roles and "report" not in roles else role
        if taken in roles:
            found.notes.append(f"{name} was left out: {roles[taken]} serves as [{taken}]")
        else:
            roles[taken] = name
    return roles


def _role(name: str) -> tuple[int, str, str]:
    """A data file's rank within its role, its name, and the role that its name tells; else calibration."""
    stem = Path(name).stem.lower()
    for role, words in ROLES.items():
        for rank, word in enumerate(words):
            if word in stem:
                return rank, name, role
    return len(ROLES), name, "calibration"


def _arrays(found: _Findings, files: Mapping[str, str]) -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays of the first readable data file, without the labels."""
    for name in files.values():
        try:
            arrays = sources.read_arrays(name, found.folder)
        except UsageError:
            continue
        return {key: array for key, array in arrays.items() if key != sources.LABEL}
    return {}


def _rename_only_input(found: _Findings, arrays: "Mapping[str, np.ndarray[Any, Any]]") -> None:
    """One input goes by place, so it may be called as the data calls it."""
    seen = found.inspected
    if seen is None or len(seen.inputs) != 1 or len(arrays) != 1 or seen.inputs[0].name in arrays:
        return
    (spec,), (name,) = seen.inputs, arrays
    if seen.why[spec.name] == "the data beside the model":
        found.inspected = replace(seen, inputs=(replace(spec, name=name),), why={name: seen.why[spec.name]})


def _load(found: _Findings, name: str) -> "Dataset":
    assert found.inspected is not None
    return sources.load(name, found.folder, found.inspected.inputs)


def _assign_data(found: _Findings, files: Mapping[str, str]) -> None:
    """Keeps the files whose arrays fit the inputs."""
    for role, name in files.items():
        try:
            data = _load(found, name)
        except UsageError as error:
            found.notes.append(f"{name} was left out: {error.message}")
            continue
        if len(data) < FEWEST_SAMPLES:
            found.notes.append(f"{name} was left out: {len(data)} samples are too few")
        elif role in ("evaluate", "report") and data.labels is None:
            found.notes.append(f"{name} holds no array 'label': its accuracy cannot be measured")
        else:
            found.data[role] = name
    if "calibration" not in found.data and "recover" in found.data:
        found.data["calibration"] = found.data["recover"]


def _finish_evaluation(found: _Findings) -> bool:
    """Whether the evaluation data judges classes; other tasks need a metric that only the user knows."""
    if "evaluate" not in found.data:
        found.data.pop("report", None)
        return False
    assert found.inspected is not None
    labels = _load(found, found.data["evaluate"]).labels
    shape = next(iter(found.inspected.outputs.values()))
    fits = (
        labels is not None
        and labels.ndim == 1
        and labels.dtype.kind in "iu"
        and len(shape) == 2
        and 0 <= int(labels.min()) <= int(labels.max()) < shape[1]
    )
    if not fits:
        name = found.data.pop("evaluate")
        found.data.pop("report", None)
        found.notes.append(
            f"{name} holds no class numbers for the output {list(shape)}: name a metric for it"
        )
    return fits


def _choose_scale(found: _Findings, module: "nn.Module") -> None:
    """A scale for whole numbers that feed a float input, where it clearly gives a better accuracy."""
    seen = found.inspected
    if seen is None or len(seen.inputs) != 1 or not seen.inputs[0].dtype.startswith("float"):
        return
    spec = seen.inputs[0]
    data = _load(found, found.data["evaluate"]).head(MOST_JUDGED)
    array = data.inputs[spec.name]
    if array.dtype.kind not in "iu" or int(array.max()) <= 1:
        return
    scales = {1.0, 1 / 255, 1 / int(array.max())}
    scored = {scale: _accuracy(module, data, spec, scale) for scale in sorted(scales)}
    best = max(scored, key=lambda scale: (scored[scale], scale))
    found.scale_why = f"accuracy {scored[best]:.3f} on {len(data)} samples, {scored[1.0]:.3f} unscaled"
    if best != 1.0 and scored[best] >= scored[1.0] + CLEAR_GAIN:
        found.scale = best
        return
    top = int(array.max())
    found.notes.append(f"{spec.name} holds whole numbers to {top}: add preprocess if training scaled them")


def _accuracy(module: "nn.Module", data: "Dataset", spec: TensorSpec, scale: float) -> float:
    import numpy as np
    import torch

    from exporters.capture import call_module, flatten_outputs

    assert data.labels is not None
    size = spec.sizes()[0]
    right = counted = 0
    for start in (
        range(0, len(data) // size * size or 0, size) if not spec.bounds else range(0, len(data), size)
    ):
        array = data.batch(start, start + size)[spec.name] * np.asarray(scale, dtype=spec.dtype)
        with torch.no_grad():
            logits = flatten_outputs(call_module(module, [spec], {spec.name: torch.from_numpy(array)}))[0]
        labels = data.labels[start : start + size]
        right += int((logits.argmax(1).numpy() == labels).sum())
        counted += len(labels)
    return right / max(counted, 1)


def _find_labels(found: _Findings, beside: Path) -> str | None:
    assert found.inspected is not None
    if len(found.inspected.outputs) != 1:
        return None
    (shape,) = found.inspected.outputs.values()
    for name in LABELS:
        file = beside / name
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        if len(shape) == 2 and len(lines) == shape[1]:
            return _relative(file, found.folder)
        found.notes.append(f"{name} was left out: {len(lines)} lines for the output {list(shape)}")
    return None


def _parsed(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def _write(file: Path, text: str) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise MissingRequirementError(
            f"{file} cannot be written",
            found=error.strerror,
            expected="a writable folder with space left",
            fix="name another place with -o",
        ) from error


def _toml(found: _Findings) -> str:
    parts = (_model_part, _inputs_part, _outputs_part, _data_part, _prune_part, _budget_part)
    return "\n".join("\n".join(part(found)) + "\n" for part in parts if list(part(found)))


def _model_part(found: _Findings) -> Iterator[str]:
    yield "# Written by deploy init: it builds as it is. Paths are relative to this file."
    target = _target(found.source)
    yield f"#     deploy plan --target {target}{' ' * 6}what would be done, and why"
    yield f"#     deploy build --target {target}{' ' * 5}does it"
    yield from (f"# Note: {_one_line(note)}." for note in found.notes)
    yield ""
    yield "[model]"
    yield _line("name", found.name)
    yield _line("source", found.source)
    if found.weights:
        yield _line("weights", found.weights)
    elif ".py:" in found.source:
        yield '# weights = "model.safetensors"     # a state dict, loaded into what the factory returns'


def _target(source: str) -> str:
    """A phone's first runtime starts from torch: an ONNX model begins on this machine."""
    return "host" if foreign.is_model(source) else "galaxy-s22"


def _inputs_part(found: _Findings) -> Iterator[str]:
    assert found.inspected is not None
    for number, spec in enumerate(found.inspected.inputs):
        if number:
            yield ""
        why = found.inspected.why.get(spec.name, "")
        yield f"[inputs.{_key(spec.name)}]" + (f"  # from {why}" if why not in ("", "given") else "")
        yield f"shape = [{', '.join(_value(size) for size in spec.shape)}]  # named dimensions are dynamic"
        yield _line("dtype", spec.dtype)
        for name, (low, high) in spec.bounds.items():
            yield f"dynamic.{_key(name)} = {{ min = {low}, max = {high} }}"
        if found.scale is not None:
            yield f"preprocess = {{ scale = {found.scale!r} }}  # {found.scale_why}"
        elif spec.dtype.startswith("float") and len(spec.shape) == 4:
            yield "# preprocess = { scale = 0.00392156862745098, mean = [0.5] }  # as in training"


def _outputs_part(found: _Findings) -> Iterator[str]:
    assert found.inspected is not None
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.inspected.outputs.items())
    yield f"# Outputs for a batch of two: {_one_line(shapes)}"
    if found.labels:
        (name,) = found.inspected.outputs
        yield f"[outputs.{_key('logits' if name == 'output' else name)}]"
        yield _line("labels", found.labels)


def _data_part(found: _Findings) -> Iterator[str]:
    yield "[calibration]"
    calibration = found.data.get("calibration")
    yield _line("source", calibration or sources.SYNTHETIC)
    if calibration is None:
        yield "# Synthetic: seeded noise of the right shape. It builds, but int8 ranges are guesses and no"
        yield "# accuracy is measured. Put 100 to 500 real samples into an .npz, arrays named as the inputs."
    if calibration and calibration == found.data.get("recover"):
        yield "samples = 256"
    yield from _evaluate_part(found)
    if report := found.data.get("report"):
        yield from ("", "[report]  # touched once, by the rung that ships", _line("source", report))
    if recover := found.data.get("recover"):
        yield from ("", "[recover]  # what was pruned learns from the dense model again")
        yield from (_line("source", recover), "epochs = 2")


def _evaluate_part(found: _Findings) -> Iterator[str]:
    yield ""
    if name := found.data.get("evaluate"):
        yield from ("[evaluate]", _line("source", name), 'metric = "accuracy"')
        yield "max_drop = 0.01  # absolute: what compression may cost"
        return
    yield "# [evaluate]  # without it accuracy stays unmeasured, and nothing is pruned unless asked"
    yield '# source = "evaluation.npz"  # arrays named as the inputs, and "label"'
    yield '# metric = "accuracy"'
    yield "# max_drop = 0.01"


def _prune_part(found: _Findings) -> Iterator[str]:
    yield "# [prune]"
    yield "# sparsity = 0.4  # the fraction of the multiply-adds that is removed"


def _budget_part(found: _Findings) -> Iterator[str]:
    yield "# [budget]"
    yield "# latency_ms = 10"
    yield "# size_mb = 4"


def _line(key: str, value: object) -> str:
    return f"{key} = {_value(value)}"


def _value(value: object) -> str:
    return tomli_w.dumps({"k": value}).partition("=")[2].strip()


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).rpartition("=")[0].strip()


def _one_line(text: str) -> str:
    """Text that stays a comment, whatever it holds."""
    return "".join(mark if mark.isprintable() else " " for mark in text).rstrip(".")
