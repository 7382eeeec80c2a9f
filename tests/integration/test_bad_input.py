"""Bad input, one case a row: one message, the documented exit code, the last good build untouched.

Most cases run the command inside this process, where a build of the tiny project costs milliseconds.
What ends or limits a process (sys.exit, signals, a full disk, a missing package) gets one of its own.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.cli.main import run

# ExecuTorch's compiler warns of its own use of the standard library when it is first imported.
pytestmark = pytest.mark.filterwarnings("default")

TARGET = ("--target", "galaxy-s22", "--no-ladder", "-o", "out")
MODEL = '''"""A tiny classifier."""

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden)


def build():
    return Tiny()
'''
TOML = """[model]
name = "tiny"
source = "model.py:build"
weights = "tiny.safetensors"

[inputs.x]
shape = ["batch", 8]
dynamic.batch = { min = 1, max = 4 }

[outputs.logits]

[calibration]
source = "calibration.npz"

[evaluate]
source = "evaluation.npz"

[quantize]
precision = "float32"

[prune]
pattern = "none"
"""

Spoil = Callable[[Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A project spoiled in one way, and what must be said about it."""

    name: str
    spoil: Spoil
    code: int
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The tiny project with a finished build in out/."""
    folder = tmp_path_factory.mktemp("good") / "tiny"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "deploy.toml").write_text(TOML)
    generator = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (16, 8), "first.bias": (16,), "second.weight": (4, 16), "second.bias": (4,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "tiny.safetensors")
    for seed, name in enumerate(("calibration", "evaluation")):
        samples = np.random.default_rng(seed).standard_normal((32, 8)).astype(np.float32)
        hidden = np.maximum(samples @ weights["first.weight"].numpy().T + weights["first.bias"].numpy(), 0)
        scores = hidden @ weights["second.weight"].numpy().T + weights["second.bias"].numpy()
        np.savez(folder / f"{name}.npz", x=samples, label=scores.argmax(axis=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_DEPLOY_CACHE", str(cache))
        assert run(["build", "-q", *TARGET[:-1], str(folder / "out"), "-c", str(folder)]) == 0
    return folder


@pytest.fixture
def project(good: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good project and its build, the current folder of the test."""
    folder = tmp_path / "tiny"
    shutil.copytree(good, folder)
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(cache))
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder with its file's hash; a folder has none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def command(*flags: str, before: str = "") -> list[str]:
    """The command in a process of its own; `before` runs there first."""
    start = f"{before}\nfrom deploy.cli.main import main\nmain({['build', *TARGET, *flags]!r})"
    return [sys.executable, "-P", "-c", start]


def same(_: Path) -> None:
    """Leaves the project as it is."""


def toml(old: str, new: str) -> Spoil:
    """deploy.toml with a text replaced, which must be there."""

    def spoil(folder: Path) -> None:
        text = (folder / "deploy.toml").read_text()
        assert old in text
        (folder / "deploy.toml").write_text(text.replace(old, new, 1))

    return spoil


def added(text: str) -> Spoil:
    """deploy.toml with tables after its own."""
    return toml(TOML, f"{TOML}\n{text}\n")


def written(name: str, content: str | bytes) -> Spoil:
    """A file of the project with other content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def removed(name: str) -> Spoil:
    """The project without one of its files."""
    return lambda folder: (folder / name).unlink()


def both(*spoils: Spoil) -> Spoil:
    """Several at once."""

    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def forward(line: str) -> Spoil:
    """The model's forward with other code after its first layer."""
    old = "        return self.second(hidden)"
    assert old in MODEL
    return written("model.py", MODEL.replace(old, line))


def factory(line: str) -> Spoil:
    """The factory with another body."""
    return written("model.py", MODEL.replace("    return Tiny()", f"    {line}"))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """The weights file after `change(state)`."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / "tiny.safetensors")
        change(state)
        save_file(state, folder / "tiny.safetensors")

    return spoil


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """A file of the project with its bytes changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def arrays(name: str, **changed: object) -> Spoil:
    """A data file with arrays replaced (a function of the old one), added, or left out (None)."""

    def spoil(folder: Path) -> None:
        with np.load(folder / name) as held:
            values = dict(held)
        for key, value in changed.items():
            values[key] = value(values.get(key)) if callable(value) else value
        np.savez(folder / name, **{key: value for key, value in values.items() if value is not None})

    return spoil


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


class RunsCode:
    """Unpickling this touches the file `owned`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, ("touch owned",)


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def checkpoint(content: object, **members: bytes) -> Spoil:
    """weights = "tiny.pt", a torch archive whose pickle holds `content`."""

    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / "tiny.pt", "w") as archive:
            archive.writestr("tiny/data.pkl", pickle.dumps(content, protocol=2))
            for name, data in {"version": b"3\n", **members}.items():
                archive.writestr(f"tiny/{name}", data)
        toml("tiny.safetensors", "tiny.pt")(folder)

    return spoil


def claims_a_terabyte(folder: Path) -> None:
    """A real checkpoint of four bytes whose pickle was edited to claim 2**40 bytes."""
    torch.save({"first.weight": torch.zeros(1)}, folder / "honest.pt")
    with zipfile.ZipFile(folder / "honest.pt") as honest, zipfile.ZipFile(folder / "tiny.pt", "w") as edited:
        for member in honest.infolist():
            data = honest.read(member)
            if member.filename.endswith("data.pkl"):
                # The storage's count, then the tensor's size: BININT1 1 becomes LONG1 2**38.
                huge = b"\x8a\x05" + (1 << 38).to_bytes(5, "little")
                assert data.count(b"K\x01") >= 2
                data = data.replace(b"K\x01", huge)
            edited.writestr(member.filename, data)
    (folder / "honest.pt").unlink()
    assert (folder / "tiny.pt").stat().st_size < 1536
    toml("tiny.safetensors", "tiny.pt")(folder)


def metric(body: str) -> Spoil:
    """A metric of the user's own."""
    return both(
        written("metrics.py", f"def mine(predict, data):\n    {body}\n"),
        toml('source = "evaluation.npz"', 'source = "evaluation.npz"\nmetric = "metrics.py:mine"'),
    )


def batches(body: str) -> Spoil:
    """Calibration by a function of the user's own."""
    return both(
        written("data.py", f"import numpy as np\n\ndef batches():\n    {body}\n"),
        toml('source = "calibration.npz"', 'source = "data.py:batches"\nsamples = 16'),
        toml('precision = "float32"', 'precision = "int8"'),
    )


int8 = toml('precision = "float32"', 'precision = "int8"')
pruned = toml('pattern = "none"', 'pattern = "structured"\nsparsity = 0.3')

deep = both(
    written("model.py", MODEL.replace("self.first(x)", "self.inner(torch.relu(self.first(x)))").replace(
        "        self.second", "        self.inner = nn.Linear(16, 16)\n        self.second")),
    toml('weights = "tiny.safetensors"', ""),
)  # fmt: skip
"""A model with one layer between its first and its last."""

tokens = both(
    written("model.py", MODEL.replace(
        "        hidden = torch.relu(self.first(x))\n        return self.second(hidden)",
        "        words = self.first.weight\n        return self.second("
        "nn.functional.embedding(x, words).sum(1).repeat(1, 2))")),
    toml("dynamic.batch", 'dtype = "int64"\ndynamic.batch'),
    *(arrays(f"{name}.npz", x=lambda x: (x > 0).astype(np.int64)) for name in ("calibration", "evaluation")),
)  # fmt: skip
"""The model made to look its input up in 16 rows."""

CASES = [
    # deploy.toml
    Case(name="unknown key", spoil=toml("name =", "nmae ="), code=2, says=("[model]", "'nmae'", "'name'")),
    Case(name="unknown table", spoil=added("[modle]\nx = 1"), code=2,
         says=("top level", "'modle'", "'model'")),
    Case(name="wrong type", spoil=toml('name = "tiny"', "name = 3"), code=2,
         says=("model.name", "`str`", "3")),
    Case(name="wrong type deep", spoil=toml("max = 4", 'max = "four"'), code=2,
         says=("`int`", "`str`", "max")),
    Case(name="wrong choice", spoil=toml("[evaluate]", '[evaluate]\naccept = "maybe"'), code=2,
         says=("evaluate.accept", "'maybe'")),
    Case(name="wrong unit", spoil=added('[budget]\nlatency_ms = "8 ms"'), code=2,
         says=("budget.latency_ms", "'8 ms'", "without its unit")),
    Case(name="negative number", spoil=added("[budget]\nsize_mb = -4"), code=2,
         says=("budget.size_mb", "-4", "above 0")),
    Case(name="nan", spoil=toml("[evaluate]", "[evaluate]\nmax_drop = nan"), code=2,
         says=("evaluate.max_drop", "nan", "finite")),
    Case(name="infinity", spoil=added("[budget]\nspeedup = inf"), code=2, says=("budget.speedup", "finite")),
    Case(name="giant number", spoil=toml("max = 4", f"max = {10**30}"), code=2, says=("max",)),
    Case(name="endless number", spoil=toml("max = 4", f"max = {'9' * 9999}"), code=2, says=("deploy.toml",)),
    Case(name="too large a batch", spoil=toml("max = 4", "max = 900000000"), code=2,
         says=("inputs.x is too large", "7.2e+09", "dynamic.NAME.max")),
    Case(name="bounds crossed", spoil=toml("min = 1", "min = 9"), code=2, says=("min 9, max 4",)),
    Case(name="empty shape", spoil=toml('["batch", 8]', "[]"), code=2, says=("inputs.x.shape", "batch")),
    Case(name="unknown dtype", spoil=toml("dynamic.batch", 'dtype = "float23"\ndynamic.batch'), code=2,
              says=("inputs.x.dtype", "'float23'", "'float32'")),
    Case(name="no inputs",
         spoil=toml('[inputs.x]\nshape = ["batch", 8]\ndynamic.batch = { min = 1, max = 4 }', ""),
         code=2, says=("no input", "[inputs.NAME]")),
    Case(name="empty file", spoil=written("deploy.toml", ""), code=2, says=("model", "deploy init")),
    Case(name="empty name", spoil=toml('"tiny"', '""'), code=2, says=("model.name", "empty")),
    Case(name="name that leaves the folder", spoil=toml('"tiny"', '"../../tiny"'), code=2,
         says=("model.name", "'../../tiny'")),
    Case(name="nul in a path", spoil=toml("calibration.npz", "a\\u0000b"), code=2,
         says=("calibration.source", "NUL")),
    Case(name="toml that does not parse", spoil=written("deploy.toml", "[model\n"), code=2,
         says=("does not parse", "line 1", "TOML 1.0")),
    Case(name="toml nested without end", spoil=written("deploy.toml", "a = " + "[" * 9999), code=2,
         says=("nested too deeply",)),
    Case(name="toml of dots", spoil=written("deploy.toml", f"target.{'a.' * 9999}a = 1"), code=2,
         says=("deploy.toml",)),
    Case(name="binary toml", spoil=written("deploy.toml", bytes(range(256))), code=2, says=("UTF-8", "0x80")),
    Case(name="toml of megabytes", spoil=lambda folder: os.truncate(folder / "deploy.toml", 2 << 20), code=2,
         says=("too large",)),
    Case(name="toml missing", spoil=removed("deploy.toml"), code=2, says=("cannot be read", "deploy init")),
    Case(name="toml is a pipe",
         spoil=both(removed("deploy.toml"), lambda f: os.mkfifo(f / "deploy.toml")), code=2,
         says=("no regular file",)),
    Case(name="table of no target", spoil=added("[target.galaxy-s99.prune]\nsparsity = 0.5"), code=2,
         says=("galaxy-s99", "galaxy-s2")),
    Case(name="bad value for one target", spoil=added("[target.galaxy-s22.prune]\nsparsity = 5"), code=2,
         says=("target.galaxy-s22.prune.sparsity", "found 5", "below 1")),
    Case(name="unknown metric", spoil=toml("[evaluate]", '[evaluate]\nmetric = "acuracy"'), code=2,
         says=("'acuracy'", "'accuracy'")),
    # flags
    Case(name="unknown flag", spoil=same, flags=("--fast-please",), code=2, says=("--fast-please",)),
    Case(name="unknown target", spoil=same, flags=("--target", "galaxy-s999"), code=2, says=("galaxy-s2",)),
    Case(name="sparsity 0", spoil=same, flags=("--sparsity", "0"), code=2,
         says=("sparsity", "0.0", "above 0")),
    Case(name="sparsity 1", spoil=same, flags=("--sparsity", "1"), code=2,
         says=("sparsity", "1.0", "below 1")),
    Case(name="sparsity 1.5", spoil=same, flags=("--sparsity", "1.5"), code=2, says=("sparsity", "1.5")),
    Case(name="sparsity nan", spoil=same, flags=("--sparsity", "nan"), code=2, says=("sparsity", "finite")),
    Case(name="sparsity 0 in the file", spoil=toml('pattern = "none"', "sparsity = 0.0"), code=2,
         says=("prune.sparsity", "leave the table out".capitalize())),
    Case(name="a ratio the channel multiple cannot reach",
         spoil=both(deep, pruned), flags=("--sparsity", "0.9"),
         code=2, says=("90", "channel")),
    Case(name="a model without an inner layer to prune", spoil=pruned, code=2,
         says=("no channel can be removed", "first", "second", "channel_multiple 8")),
    # files that are missing or of another kind
    Case(name="missing model", spoil=removed("model.py"), code=2, says=("model.py is missing",)),
    Case(name="missing factory", spoil=toml("model.py:build", "model.py:bulid"), code=2,
         says=("'bulid'", "build")),
    Case(name="missing weights", spoil=removed("tiny.safetensors"), code=2,
         says=("tiny.safetensors", "missing")),
    Case(name="missing data", spoil=removed("evaluation.npz"), code=2, says=("evaluation.npz is missing",)),
    Case(name="missing labels file",
         spoil=toml("[outputs.logits]", '[outputs.logits]\nlabels = "no.txt"'), code=2,
         says=("no.txt",)),
    Case(name="weights of no known kind", spoil=toml("tiny.safetensors", "model.py"), code=2,
         says=(".py", ".safetensors")),
    Case(name="data of no known kind", spoil=toml("evaluation.npz", "model.py"), code=2,
         says=("known kind", ".npz")),
    Case(name="a folder where weights are expected", code=2, says=("tiny.safetensors",),
         spoil=both(removed("tiny.safetensors"), lambda folder: (folder / "tiny.safetensors").mkdir())),
    Case(name="a folder where data are expected", code=2, says=("evaluation.npz", "holds no data"),
         spoil=both(removed("evaluation.npz"), lambda folder: (folder / "evaluation.npz").mkdir())),
    # weights
    Case(name="weights lack a key", spoil=weights(lambda state: state.pop("second.bias")), code=4,
         says=("does not fit the model", "missing: second.bias")),
    Case(name="weights hold a stranger",
         spoil=weights(lambda state: state.update(third=torch.ones(1))), code=4,
         says=("not in the model: third",)),
    Case(name="weights of another shape", code=4, says=("first.bias (3,) for (16,)",),
         spoil=weights(lambda state: state.update({"first.bias": torch.ones(3)}))),
    Case(name="weights of another kind", code=4, says=("first.bias int64 for float32",),
         spoil=weights(lambda state: state.update({"first.bias": torch.ones(16, dtype=torch.int64)}))),
    Case(name="nan in weights", code=4, says=("NaN", "in second.bias"),
         spoil=weights(lambda state: state["second.bias"].fill_(float("nan")))),
    Case(name="truncated safetensors", spoil=bytes_of("tiny.safetensors", lambda data: data[:300]), code=4,
         says=("tiny.safetensors cannot be loaded", "save it again".capitalize())),
    Case(name="empty safetensors", spoil=written("tiny.safetensors", b""), code=4,
         says=("cannot be loaded",)),
    Case(name="safetensors with a giant header",
         spoil=written("tiny.safetensors", (2**62).to_bytes(8, "little")),
         code=4, says=("cannot be loaded",)),
    Case(name="safetensors that claims terabytes", code=4, says=("cannot be loaded",),
         spoil=written("tiny.safetensors",
                       header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}))),
    Case(name="safetensors that overflows", code=4, says=("tiny.safetensors",),
         spoil=written("tiny.safetensors",
                       header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}))),
    Case(name="safetensors nested without end", code=4, says=("cannot be loaded",),
         spoil=written("tiny.safetensors", (40000).to_bytes(8, "little") + b"[" * 40000)),
    Case(name="pickle as safetensors", spoil=written("tiny.safetensors", pickle.dumps(RunsCode())), code=4,
         says=("cannot be loaded",)),
    Case(name="a bare pickle as pt", code=4, says=("tiny.pt", "torch's zip format"),
         spoil=both(written("tiny.pt", pickle.dumps(RunsCode())), toml("tiny.safetensors", "tiny.pt"))),
    Case(name="a pt that runs code", spoil=checkpoint({"a": RunsCode()}), code=4,
         says=("posix.system", "not run", "safetensors")),
    Case(name="a pt that holds a module", code=4, says=("torch.nn.modules.linear.Linear",),
         spoil=both(lambda folder: torch.save(torch.nn.Linear(2, 2), folder / "tiny.pt"),
                    toml("tiny.safetensors", "tiny.pt"))),
    Case(name="a pt that claims a terabyte", spoil=claims_a_terabyte, code=4,
         says=("claims more than it holds",)),
    Case(name="a pt that asks for a bytearray", spoil=checkpoint({"a": Calls(bytearray, 2**40)}), code=4,
         says=("bytearray",)),
    Case(name="a pt that makes a storage",
         spoil=checkpoint({"a": Calls(torch.UntypedStorage, 2**40)}), code=4,
         says=("tiny.pt cannot be loaded",)),
    Case(name="a truncated pt", code=4, says=("tiny.pt",),
         spoil=both(lambda f: torch.save(load_file(f / "tiny.safetensors"), f / "tiny.pt"),
                    bytes_of("tiny.pt", lambda data: data[: len(data) // 2]),
                    toml("tiny.safetensors", "tiny.pt"))),
    Case(name="a pt without tensors", spoil=checkpoint({"epoch": 3}), code=4, says=("no state dict",)),
    # the factory
    Case(name="factory that raises", spoil=factory('raise ValueError("no luck")'), code=4,
         says=("model.py:build raised at model.py, line 19", "ValueError: no luck")),
    Case(name="factory of no module", spoil=factory("return 3"), code=4,
         says=("model.py:build returns no module", "int", "torch.nn.Module")),
    Case(name="factory that exits", spoil=factory("raise SystemExit(0)"), code=4,
         says=("sys.exit", "line 19")),
    Case(name="file that exits on import", spoil=written("model.py", "import sys\nsys.exit(0)\n"), code=4,
         says=("importing model.py", "sys.exit", "line 2")),
    Case(name="file that does not parse", spoil=written("model.py", "def build(:\n"), code=4,
         says=("importing model.py", "SyntaxError", "line 1")),
    Case(name="file that lacks a package", spoil=written("model.py", "import nosuchpackage\n"), code=4,
         says=("importing model.py", "nosuchpackage", "line 1")),
    Case(name="factory without end", spoil=factory("return build()"), code=4, says=("RecursionError",)),
    Case(name="factory without memory", spoil=factory("return bytearray(1 << 60)"), code=4,
         says=("MemoryError",)),
    # the forward
    Case(name="forward that raises", spoil=forward('        raise KeyError("gate")'), code=4,
         says=("model.py, line 15", "KeyError", "gate")),
    Case(name="forward that exits", spoil=forward("        raise SystemExit(0)"), code=4,
         says=("model.py, line 15", "SystemExit")),
    Case(name="forward that takes other shapes", spoil=toml('["batch", 8]', '["batch", 9]'), code=4,
         says=("model.py, line 14", "x ['batch', 9]")),
    Case(name="tokens beyond the vocabulary", code=2,
         spoil=both(tokens, arrays("evaluation.npz", x=lambda x: x + 90)),
         says=("raised on the project's data", "model.py, line 15", "index out of range")),
    Case(name="data-dependent branch", code=4,
         says=("torch.export refused", "model.py, line 15", "torch.cond", "aten.sum"),
         spoil=forward("        if hidden.sum() > 0:\n            return self.second(hidden)\n"
                       "        return self.second(-hidden)")),
    Case(name="data-dependent shape", code=4, says=("torch.export refused", "model.py, line 15", "aten.sum"),
         spoil=forward("        return self.second(hidden)[: int((hidden > 0).sum())]")),
    Case(name="nan outputs", spoil=forward("        return self.second(hidden) * float('nan')"), code=4,
         says=("output logits is NaN", "evaluation.npz")),
    Case(name="nan outputs without evaluation", code=4, says=("output logits is NaN", "calibration.npz"),
         spoil=both(forward("        return self.second(hidden) * float('nan')"),
                    toml('[evaluate]\nsource = "evaluation.npz"', ""))),
    Case(name="outputs of another number", spoil=toml("[outputs.logits]", "[outputs.a]\n[outputs.b]"), code=2,
         says=("[outputs] does not fit", "a, b")),
    # data
    Case(name="data of other names",
         spoil=arrays("evaluation.npz", x=None, picture=np.ones((9, 8), np.float32)),
         code=2, says=("evaluation.npz lacks 'x'", "picture")),
    Case(name="data of another shape", spoil=arrays("evaluation.npz", x=lambda x: x[:, :7]), code=2,
         says=("'x' of evaluation.npz has the wrong shape", "(7,)", "(8,)")),
    Case(name="data of another dtype",
         spoil=arrays("evaluation.npz", x=lambda x: x.astype(np.complex64)), code=2,
         says=("not numeric", "complex64")),
    Case(name="data of integers", spoil=arrays("evaluation.npz", x=lambda x: x.astype(np.int64)), code=2,
         says=("wrong dtype", "int64", "float32")),
    Case(name="data beyond float32", spoil=arrays("evaluation.npz", x=lambda x: x.astype(np.float64) * 1e300),
         code=2, says=("does not fit into float32", "e+300")),
    Case(name="data that is one number", spoil=arrays("evaluation.npz", x=np.float32(3)), code=2,
         says=("one number",)),
    Case(name="labels out of range", spoil=arrays("evaluation.npz", label=lambda y: y + 9), code=2,
         says=("label of evaluation.npz is out of range", "0 to 3")),
    Case(name="labels of floats", spoil=arrays("evaluation.npz", label=lambda y: y + 0.5), code=2,
         says=("no class numbers", "float64")),
    Case(name="labels of words", spoil=arrays("evaluation.npz", label=np.array(["cat"] * 32)), code=2,
         says=("labels of evaluation.npz", "numeric")),
    Case(name="labels of another number", spoil=arrays("evaluation.npz", label=lambda y: y[:-1]), code=2,
         says=("31", "32")),
    Case(name="labels missing", spoil=arrays("evaluation.npz", label=None), code=2,
         says=("needs labels", "'label'")),
    Case(name="nan in data", spoil=arrays("evaluation.npz", x=lambda x: np.where(x > 1, np.nan, x)), code=2,
         says=("'x' of evaluation.npz holds NaN",)),
    Case(name="nan in calibration",
         spoil=both(int8, arrays("calibration.npz", x=lambda x: x * np.nan)), code=2,
         says=("'x' of calibration.npz holds NaN",)),
    Case(name="data without samples",
         spoil=arrays("evaluation.npz", x=lambda x: x[:0], label=lambda y: y[:0]),
         code=2, says=("evaluation.npz holds no samples",)),
    Case(name="too few calibration samples",
         spoil=both(int8, arrays("calibration.npz", x=lambda x: x[:3], label=None)),
         code=2, says=("too few calibration samples", "3", "at least 8")),
    Case(name="truncated npz", spoil=bytes_of("evaluation.npz", lambda data: data[:200]), code=2,
         says=("evaluation.npz cannot be read",)),
    Case(name="npz of pickles",
         spoil=arrays("evaluation.npz", x=np.array([RunsCode()], dtype=object)), code=2,
         says=("evaluation.npz",)),
    Case(name="data function that raises", spoil=batches("raise OSError(2, 'no such drive')"), code=2,
         says=("data.py:batches raised at data.py, line 4", "no such drive")),
    Case(name="data function that exits half-way", code=2, says=("sys.exit", "data.py, line 4"),
         spoil=batches("yield {'x': np.ones((4, 8), np.float32)}; raise SystemExit(1)")),
    Case(name="data function of lists", spoil=batches("yield [1, 2]"), code=2,
         says=("data.py:batches", "list")),
    Case(name="data function of nothing", spoil=batches("return []"), code=2, says=("no batches",)),
    # the metric
    Case(name="metric that raises", spoil=metric("return 1 / 0"), code=2,
         says=("metrics.py:mine raised at metrics.py, line 2", "ZeroDivisionError")),
    Case(name="metric of nan", spoil=metric("return float('nan')"), code=2,
         says=("metrics.py:mine", "nan", "finite")),
    Case(name="metric of words", spoil=metric("return 'good'"), code=2,
         says=("metrics.py:mine", "'good'", "float")),
    Case(name="metric that exits", spoil=metric("raise SystemExit(0)"), code=2,
         says=("metrics.py:mine", "sys.exit")),
    Case(name="metric file that raises", code=2, says=("importing metrics.py", "line 1"),
         spoil=both(metric("return 1.0"), written("metrics.py", "1 / 0\n"))),
    Case(name="metric that is missing", code=2, says=("metrics.py", "'mine'"),
         spoil=both(metric("return 1.0"), written("metrics.py", "def yours(predict, data): return 1.0\n"))),
    # where builds go
    Case(name="output below a file", spoil=same, flags=("-o", "deploy.toml/x"), code=2,
         says=("output folder", "deploy.toml is a file")),
    Case(name="output is a broken link", flags=("-o", "link"), code=2, says=("broken link",),
         spoil=lambda folder: (folder / "link").symlink_to("nowhere")),
    Case(name="output not writable", spoil=same, flags=("-o", "/proc/edge-deploy"), code=3,
         says=("cannot write to /proc/edge-deploy", "--output-dir")),
    Case(name="output of too long a name", spoil=same, flags=("-o", "n" * 300), code=3,
         says=("cannot write",)),
]  # fmt: skip


def require_one_message(text: str, case: Case) -> None:
    """One line that names what is wrong, and no traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert lines[0].startswith("deploy: ")
    if case.code != 130 and "--fast-please" not in case.flags:  # an interruption; click's own words
        assert re.search(r"expected .+\. .+[.?!]$", lines[0]), lines[0]
    for word in case.says:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input_is_told_in_one_message_and_leaves_the_last_build(
    case: Case, project: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.spoil(project)
    before = contents(project)
    code = run(["build", *TARGET, *case.flags])
    told = capsys.readouterr()
    assert told.out == ""
    require_one_message(told.err, case)
    assert code == case.code
    assert contents(project) == before
    assert not list(cache.glob("tmp/*"))


def finished(
    process: "subprocess.CompletedProcess[str]", folder: Path, before: dict[str, str], case: Case
) -> None:
    """The same claims for a process of its own."""
    assert process.stdout == ""
    require_one_message(process.stderr, case)
    assert process.returncode == case.code
    assert contents(folder) == before


def limited(kind: str, size: int) -> str:
    """Code that limits a process before the command starts."""
    return f"import resource; resource.setrlimit(resource.{kind}, ({size}, {size}))"


DISK_FULL = Case(
    name="disk full", spoil=same, code=3, says=("cannot write to", "--output-dir", "EDGE_DEPLOY_CACHE")
)
MISSING = Case(
    name="missing extra", spoil=same, code=3, says=("executorch", "pip install 'edge-deploy[executorch]'")
)


def test_a_file_of_a_kilobyte_that_claims_a_terabyte_allocates_nothing(project: Path) -> None:
    claims_a_terabyte(project)
    code = (
        "import resource; from pathlib import Path; from deploy.weights import load_weights\n"
        "from targets.errors import ModelError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))\n"
        "try:\n    load_weights(Path('tiny.pt'))\n"
        "except ModelError as error:\n    print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "claims more than it holds" in done.stdout


def test_no_case_has_run_the_code_of_a_pickle(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spoil in (checkpoint({"a": RunsCode()}), written("tiny.pt", pickle.dumps(RunsCode()))):
        spoil(project)
        assert run(["build", *TARGET]) == 4
    assert not (project / "owned").exists()
    assert "posix.system" in capsys.readouterr().err


def test_a_limit_on_file_size_reads_as_a_full_disk(project: Path, tmp_path: Path) -> None:
    before = contents(project)
    env = {**os.environ, "EDGE_DEPLOY_CACHE": str(tmp_path / "small")}
    done = subprocess.run(
        command(before=limited("RLIMIT_FSIZE", 1024)), env=env, capture_output=True, text=True, check=False
    )
    finished(done, project, before, DISK_FULL)
    assert os.strerror(errno.EFBIG) in done.stderr
    assert not list((tmp_path / "small").glob("tmp/*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small disk can only be mounted by root; the limit on file size is tested all the same")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, leaving: int) -> None:
    """Takes all room but so many bytes."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - leaving))


def test_a_full_disk_below_the_output_leaves_the_last_build(
    project: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "out", small_disk / "out")
    fill(small_disk, leaving=8 << 10)
    before = contents(small_disk)
    code = run(["build", *TARGET[:-1], str(small_disk / "out")])
    require_one_message(capsys.readouterr().err, DISK_FULL)
    assert code == 3
    assert contents(small_disk) == before


@pytest.mark.parametrize("leaving", [0, 16 << 10], ids=["at-once", "in-a-stage"])
def test_a_full_disk_below_the_cache_leaves_the_last_build(
    leaving: int,
    project: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(small_disk, leaving=leaving)
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(small_disk / "cache"))
    before = contents(project)
    code = run(["build", *TARGET])
    require_one_message(capsys.readouterr().err, DISK_FULL)
    assert code == 3
    assert contents(project) == before


def test_a_cache_that_is_a_file_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(project / "model.py"))
    before = contents(project)
    assert run(["build", *TARGET]) == 3
    require_one_message(capsys.readouterr().err, DISK_FULL)
    assert contents(project) == before


def test_a_folder_in_the_place_of_a_file_of_the_build_stops_it_whole(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "out" / "tiny" / "galaxy-s22" / "report.html").unlink()
    (project / "out" / "tiny" / "galaxy-s22" / "report.html").mkdir()
    before = contents(project)
    assert run(["build", *TARGET]) == 2
    assert "report.html is a folder" in capsys.readouterr().err
    assert contents(project) == before


def test_a_missing_extra_is_named_with_its_pip_line(project: Path) -> None:
    before = contents(project)
    hide = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torchao' else find(name, *rest)"
    )
    done = subprocess.run(command(before=hide), capture_output=True, text=True, check=False)
    finished(done, project, before, MISSING)


def test_json_holds_the_error_alone_on_stdout_even_when_the_factory_prints(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory('print("hello"); raise ValueError("no luck")')(project)
    assert run(["build", *TARGET, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)["error"]
    assert (told["kind"], told["exit_code"]) == ("model", 4)
    assert "no luck" in told["message"]


def test_the_lock_of_a_killed_build_does_not_hold(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = (
        "import time; from pathlib import Path; from deploy.disk import locked\n"
        "with locked(Path('out/tiny/galaxy-s22').absolute()):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        assert run(["build", "-q", *TARGET]) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_exits_130_and_the_next_run_goes_on_from_the_finished_stages(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own-cache"
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(own))
    # A metric that waits holds the build in validation, after the export was finished.
    waits = "import os, time; open('reached', 'w').close(); time.sleep(60 if os.path.exists('wait') else 0)"
    metric(f"{waits}; return 1.0")(project)
    (project / "wait").touch()
    before = contents(project)
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as building:
        deadline = time.monotonic() + 60
        while not (project / "reached").exists() and time.monotonic() < deadline:
            assert building.poll() is None, building.communicate()
            time.sleep(0.05)
        building.send_signal(signal.SIGINT)
        out, err = building.communicate(timeout=30)
    (project / "reached").unlink()
    case = Case(name="ctrl-c", spoil=same, code=130, says=("Interrupted", "same command again"))
    finished(subprocess.CompletedProcess([], building.returncode, out, err), project, before, case)
    assert not list(own.glob("tmp/*"))
    (project / "wait").unlink()
    again = subprocess.run(command("--explain-cache"), capture_output=True, text=True, check=True)
    assert "export dense-float: cached" in again.stdout
    assert "validate dense-float: ran" in again.stdout


def test_unicode_and_spaces_in_paths_and_names_build(
    good: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "caché 缓存"))
    folder = tmp_path / "mein Übungs-Projekt 数字 🙂"
    shutil.copytree(good, folder, ignore=shutil.ignore_patterns("out"))
    (folder / "model.py").rename(folder / "mein modell.v2.py")
    (folder / "tiny.safetensors").rename(folder / "gewichte é.safetensors")
    (folder / "evaluation.npz").rename(folder / "prüfung 1.npz")
    toml("model.py", "mein modell.v2.py")(folder)
    toml("tiny.safetensors", "gewichte é.safetensors")(folder)
    toml("evaluation.npz", "prüfung 1.npz")(folder)
    toml('"tiny"', '"ziffern – 数字 1"')(folder)
    toml("[outputs.logits]", '[outputs."ergebnis é"]')(folder)
    assert run(["build", "-c", str(folder), *TARGET[:-1], str(tmp_path / "aus gabe"), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["model"] == "ziffern – 数字 1"
    build = tmp_path / "aus gabe" / "ziffern – 数字 1" / "galaxy-s22"
    assert {file["path"] for file in manifest["files"]} <= {path.name for path in build.iterdir()}
    assert [output["name"] for output in manifest["outputs"]] == ["ergebnis é"]
