"""Looks at a user's model: its factory, and inputs that its forward really takes."""

import ast
import contextlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.spec import TensorSpec
from deploy import usercode
from exporters.capture import call_module, example, flatten_outputs
from exporters.quiet import quiet
from targets.errors import ModelError, UsageError

PICTURES = (224, 96, 64, 48, 32, 28, 16, 8)
SMALL_PICTURES = (32, 28, 64, 96, 224, 48, 16, 8)
LENGTHS_1D = (16000, 4096, 1024, 256, 128, 64, 32, 16)
VOLUMES = (64, 32, 16, 8)
TOKENS = (128, 64, 32, 16, 8)
FRAMES = 32
LARGEST_SMALL_SAMPLE = 16384
BATCHES = (1, 3)
MOST_TRIES = 400
MOST_LAYERS = 6
SCRIPTS = ("train", "fit", "main", "run", "test", "evaluate", "export", "plot", "download")
BATCH_WORDS = ("batch", "batch_size", "b", "n", "bs")
DTYPE_WORDS = {"Float": "float32", "Float32": "float32", "Int": "int64", "Int64": "int64", "Int32": "int32"}
JAXTYPING = re.compile(r"\b(\w+)\[[^]\"']*[\"']([^\"']+)[\"']\s*\]")
IN_WORDS = re.compile(r"\(\s*(\w+)\s*((?:,\s*\d+\s*)+),?\)")
TOKEN_WORDS = ("ids", "token", "mask", "index", "indices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """An input's shape for one sample and where the guess comes from; `batch` is False for a fixed shape."""

    shape: tuple[int, ...]
    dtype: str
    why: str
    batch: bool = True

    def spec(self, name: str) -> TensorSpec:
        """As a spec with a dynamic batch, small for large samples."""
        if not self.batch:
            return TensorSpec(name=name, shape=self.shape, dtype=self.dtype)
        most = 64 if int(np.prod(self.shape)) <= LARGEST_SMALL_SAMPLE else 8
        shape: tuple[int | str, ...] = ("batch", *self.shape)
        return TensorSpec(name=name, shape=shape, dtype=self.dtype, bounds={"batch": (1, most)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """Inputs that the forward took, its outputs' names and shapes, and what a reader should know."""

    inputs: tuple[TensorSpec, ...]
    outputs: Mapping[str, tuple[int, ...]]
    why: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


def find_factory(file_name: str, folder: Path) -> str:
    """The "file.py:name" of the one factory in a file.

    A factory is a function without required arguments that says or shows that it returns a module; where
    there is none, a module class without required arguments. Raises UsageError that lists them when there
    are several, or says what would be one.
    """
    module = usercode.load_file(file_name, folder)
    functions = [name for name, value in _own(module) if _is_factory(value, module)]
    classes = [name for name, value in _own(module) if _is_class(value)]
    found = functions or classes
    if len(found) == 1:
        return f"{file_name}:{found[0]}"
    if found:
        raise UsageError(
            f"{file_name} holds several factories",
            found=", ".join(found),
            expected="one, or the name of the one to take",
            fix=f"deploy init {file_name}:{found[0]}",
        )
    raise UsageError(
        f"{file_name} holds no factory",
        found=", ".join(name for name, _ in _own(module))[:200] or "nothing",
        expected="a function or nn.Module class that needs no arguments",
        fix="define def build() -> nn.Module, which returns the model",
    )


def inspect_model(
    module: nn.Module,
    folder: Path,
    *,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    inputs: Sequence[TensorSpec],
) -> Inspected:
    """Inputs that the module's forward takes: the given ones, else the first guess that really runs.

    `arrays` are samples found beside the model, by name. Raises ModelError when nothing fits.
    """
    module = module.eval()
    if inputs:
        outputs = _try(module, inputs, 2)
        if outputs is None:
            _raise_own(module, inputs)
            raise AssertionError("a forward that failed runs now")
        return _inspected(
            module, tuple(inputs), outputs, dict.fromkeys((s.name for s in inputs), "given"), []
        )
    names = _parameters(module)
    guesses = {name: _guesses(module, name, arrays, alone=len(names) == 1) for name in names}
    for chosen in itertools.islice(itertools.product(*guesses.values()), MOST_TRIES):
        specs = tuple(guess.spec(name) for name, guess in zip(names, chosen, strict=True))
        outputs = _try(module, specs, 2)
        if outputs is not None:
            why = {name: guess.why for name, guess in zip(names, chosen, strict=True)}
            notes = _other_sizes(module, names, chosen, guesses)
            return _inspected(module, *_fit_batch(module, specs, outputs), why, notes)
    raise ModelError(
        "no input was found that the model's forward takes",
        found=f"forward({', '.join(names)}), {sum(map(len, guesses.values()))} shapes tried",
        expected="the shape and dtype of each input",
        fix=f"deploy init MODEL --input {names[0] if names else 'image'}:batch,3,224,224:float32",
    )


def _own(module: ModuleType) -> list[tuple[str, Any]]:
    """Public names that this very file defines."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and not _required(value)


def _is_factory(value: Any, module: ModuleType) -> bool:
    if not inspect.isfunction(value) or _required(value) or value.__name__.lower().startswith(SCRIPTS):
        return False
    returned = inspect.signature(value).return_annotation
    if isinstance(returned, str):
        returned = _named(returned, module)
    if returned is not inspect.Signature.empty:
        return isinstance(returned, type) and issubclass(returned, nn.Module)
    return _returns_module(value, module)


def _returns_module(function: Any, module: ModuleType) -> bool:
    """Whether a function without annotation makes a module, read off its source: it is not called."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    if not any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree)):
        return False
    called = [_named(ast.unparse(node.func), module) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(one, type) and issubclass(one, nn.Module) for one in called)


def _named(dotted: str, module: ModuleType) -> Any:
    value: Any = module
    for part in dotted.strip("'\"").split("."):
        value = getattr(value, part, None)
    return value


def _required(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in skipped for p in parameters)


def _parameters(module: nn.Module) -> list[str]:
    """What forward must be given; its first parameter where it has defaults for all."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)]
    required = [p.name for p in plain if p.default is p.empty]
    return required or [p.name for p in plain[:1]] or ["input"]


def _guesses(
    module: nn.Module, name: str, arrays: Mapping[str, np.ndarray[Any, Any]], *, alone: bool
) -> list[Guess]:
    """Shapes for one input, the surest first, each once."""
    found = [
        *_from_example(module, name, alone=alone),
        *_from_arrays(name, arrays, alone=alone),
        *_from_annotation(module, name),
        *_from_words(module),
        *_from_layers(module, name),
    ]
    unique: dict[tuple[tuple[int, ...], str, bool], Guess] = {}
    for guess in found:
        unique.setdefault((guess.shape, guess.dtype, guess.batch), guess)
    return list(unique.values())


def _from_example(module: nn.Module, name: str, *, alone: bool) -> Iterator[Guess]:
    """Lightning's example_input_array: a tensor, or a dictionary of them."""
    given = getattr(module, "example_input_array", None)
    tensor = given.get(name) if isinstance(given, Mapping) else given if alone else None
    if isinstance(tensor, Tensor) and tensor.dim():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield Guess(shape=tuple(tensor.shape[1:]), dtype=dtype, why="the module's example_input_array")


def _from_arrays(name: str, arrays: Mapping[str, np.ndarray[Any, Any]], *, alone: bool) -> Iterator[Guess]:
    """The array of that name; the only one where there is one input."""
    array = arrays.get(name, next(iter(arrays.values())) if alone and len(arrays) == 1 else None)
    if array is None or not array.ndim:
        return
    dtypes: tuple[str, ...] = ("float32",) if array.dtype.kind == "f" else ("int64", "float32")
    if array.dtype == np.uint8:  # pictures as a camera or a file gives them
        dtypes = ("float32", "int64", "uint8")
    for dtype in dtypes:
        yield Guess(shape=tuple(array.shape[1:]), dtype=dtype, why="the data beside the model")


def _from_annotation(module: nn.Module, name: str) -> Iterator[Guess]:
    """jaxtyping's Float[Tensor, "batch 3 32 32"]."""
    parameter = inspect.signature(module.forward).parameters.get(name)
    match = JAXTYPING.search(str(parameter.annotation)) if parameter else None
    if match is None:
        return
    sizes = match[2].split()[1:]
    if sizes and all(size.isdecimal() for size in sizes):
        dtype = DTYPE_WORDS.get(match[1], "float32")
        yield Guess(shape=tuple(map(int, sizes)), dtype=dtype, why="the annotation of forward")


def _from_words(module: nn.Module) -> Iterator[Guess]:
    """A docstring's "(batch, 1, 8, 8)"."""
    texts = (type(module).__dict__.get("__doc__"), inspect.getdoc(type(module).forward))
    for match in (found for text in texts if text for found in IN_WORDS.finditer(text)):
        if match[1].lower() in BATCH_WORDS:
            sizes = tuple(int(size) for size in match[2].split(",") if size.strip())
            for dtype in ("float32", "int64"):
                yield Guess(shape=sizes, dtype=dtype, why="the model's docstring")


def _from_layers(module: nn.Module, name: str) -> Iterator[Guess]:
    known = tuple(LAYERS)
    layers = [path for path, part in module.named_modules() if isinstance(part, known)]
    guesses = [g for path in layers[:MOST_LAYERS] for g in _of_layer(path, module.get_submodule(path))]
    is_token = any(word in name.lower() for word in TOKEN_WORDS)
    if is_token:  # masks and token types have no layer of their own
        guesses += [Guess(shape=(n,), dtype="int64", why=f"the name {name}") for n in TOKENS]
    yield from sorted(guesses, key=lambda guess: is_token and guess.dtype != "int64")


def _of_layer(path: str, part: nn.Module) -> Iterator[Guess]:
    rule = next(rule for kind, rule in LAYERS.items() if isinstance(part, kind))
    for shape, dtype, batch in rule(part):
        yield Guess(shape=shape, dtype=dtype, batch=batch, why=f"the layer {path or 'itself'}")


Shapes = Iterator[tuple[tuple[int, ...], str, bool]]


def _conv2d(part: Any) -> Shapes:
    # A stem that does not shrink its input is that of small pictures.
    small = max(part.stride) == 1 and max(part.kernel_size) <= 3
    for size in SMALL_PICTURES if small else PICTURES:
        yield (part.in_channels, size, size), "float32", True


def _conv1d(part: Any) -> Shapes:
    for size in LENGTHS_1D:
        yield (part.in_channels, size), "float32", True


def _conv3d(part: Any) -> Shapes:
    for size in VOLUMES:
        yield (part.in_channels, size, size, size), "float32", True


def _embedding(part: Any) -> Shapes:
    for size in TOKENS:
        yield (size,), "int64", True
    yield (), "int64", True


def _linear(part: Any) -> Shapes:
    yield (part.in_features,), "float32", True
    yield (FRAMES, part.in_features), "float32", True


def _recurrent(part: Any) -> Shapes:
    if part.batch_first:
        yield (FRAMES, part.input_size), "float32", True
    else:
        yield (FRAMES, 1, part.input_size), "float32", False


def _norm(part: Any) -> Shapes:
    yield tuple(part.normalized_shape), "float32", True
    yield (FRAMES, *part.normalized_shape), "float32", True


LAYERS: dict[type[nn.Module], Callable[[Any], Shapes]] = {
    nn.Conv2d: _conv2d,
    nn.Conv1d: _conv1d,
    nn.Conv3d: _conv3d,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.Linear: _linear,
    nn.RNNBase: _recurrent,
    nn.LayerNorm: _norm,
}


def _try(module: nn.Module, specs: Sequence[TensorSpec], batch: int) -> dict[str, tuple[int, ...]] | None:
    """The outputs' names and shapes, None when the forward raises."""
    try:
        return _run(module, specs, batch)
    except (Exception, SystemExit):  # a wrong guess may fail in any way
        return None


def _run(module: nn.Module, specs: Sequence[TensorSpec], batch: int) -> dict[str, tuple[int, ...]] | None:
    sizes = {name: min(max(low, batch), high) for s in specs for name, (low, high) in s.bounds.items()}
    tensors = {spec.name: example(spec, **sizes) for spec in specs}
    with quiet(), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        answer = call_module(module, specs, tensors)
        leaves = flatten_outputs(answer)
    named = _keys(answer)
    if not leaves:
        return None
    names = named if len(named) == len(leaves) else [f"output_{i}" for i in range(len(leaves))]
    if len(leaves) == 1 and not named:
        names = ["output"]
    return {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}


def _keys(answer: Any) -> list[str]:
    if isinstance(answer, Mapping):
        return [str(key) for key, value in answer.items() if isinstance(value, Tensor)]
    fields = getattr(answer, "__dataclass_fields__", {})
    return [name for name in fields if isinstance(getattr(answer, name), Tensor)]


def _fit_batch(
    module: nn.Module, specs: tuple[TensorSpec, ...], outputs: dict[str, tuple[int, ...]]
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, ...]]]:
    """The specs with a dynamic batch where other batches run too; else with a batch of one, or two."""
    if all(_try(module, specs, batch) for batch in BATCHES):
        return specs, outputs
    for batch in (1, 2):
        fixed = tuple(_fixed(spec, batch) for spec in specs)
        shapes = _try(module, fixed, batch)
        if shapes is not None:
            return fixed, shapes
    return specs, outputs


def _fixed(spec: TensorSpec, batch: int) -> TensorSpec:
    shape = tuple(batch if size == "batch" else size for size in spec.shape)
    return TensorSpec(name=spec.name, shape=shape, dtype=spec.dtype)


def _other_sizes(
    module: nn.Module, names: Sequence[str], chosen: Sequence[Guess], guesses: Mapping[str, list[Guess]]
) -> list[str]:
    """A remark where a shape is one of several that run: only the user knows what the model learned from."""
    if len(names) != 1 or not chosen[0].why.startswith("the layer"):
        return []
    others = [
        guess.shape
        for guess in guesses[names[0]]
        if guess.why == chosen[0].why and guess != chosen[0] and _try(module, (guess.spec(names[0]),), 2)
    ]
    shown = ", ".join(str(list(shape)) for shape in others)
    return (
        [f"{list(chosen[0].shape)} is a guess: {shown} run too; write what it was trained on"]
        if others
        else []
    )


def _inspected(
    module: nn.Module,
    specs: tuple[TensorSpec, ...],
    outputs: Mapping[str, tuple[int, ...]],
    why: Mapping[str, str],
    notes: Sequence[str],
) -> Inspected:
    fixed = any("batch" not in spec.shape for spec in specs)
    extra = ["the batch is fixed: other batches do not run"] if fixed and "given" not in why.values() else []
    return Inspected(inputs=specs, outputs=outputs, why=why, notes=(*notes, *extra))


def _raise_own(module: nn.Module, inputs: Sequence[TensorSpec]) -> None:
    from exporters.capture import check_forward

    check_forward(module, inputs)
