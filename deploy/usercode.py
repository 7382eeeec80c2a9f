"""The user's own Python files, loaded by path under a private name.

A project's files may import their siblings and may be called deploy.py or calibration.py: inside
them, and only there, a name is looked for beside them first. Nothing is put on sys.path.
"""

import builtins
import contextlib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from targets.errors import DeployError, ModelError, UsageError, first_line, nearest

PREFIX = "_edge_deploy_user_"

_LOADED: dict[str, tuple[int, int] | None] = {}
"""When each private module's file was last changed, as of its import."""


def load_attribute(reference: str, folder: Path, *, error: type[DeployError] = ModelError) -> Any:
    """What "file.py:name" names. Raises `error` when the file raises, UsageError when it lacks the name."""
    file_name, _, attribute = reference.rpartition(":")
    if not attribute or Path(file_name).suffix != ".py":
        raise UsageError(
            "a Python reference does not fit",
            found=repr(reference),
            expected='"file.py:name"',
            fix="name the function after a colon",
        )
    module = load_file(file_name, folder, error=error)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UsageError(
            f"{file_name} has no {attribute!r}",
            found=", ".join(nearest(attribute, public)) or "nothing",
            expected=f"a function called {attribute}",
            fix=f"correct {reference!r}, or define it",
        )
    return getattr(module, attribute)


def load_file(file_name: str, folder: Path, *, error: type[DeployError] = ModelError) -> ModuleType:
    """A user's file as a module. Raises `error` when it raises, UsageError when it is missing."""
    file = folder / file_name
    if not file.is_file():
        raise UsageError(
            f"{file_name} is missing",
            found=f"no file at {file}",
            expected="a Python file of the project",
            fix="correct the reference, or put the file there; paths are relative to deploy.toml",
        )
    return _import(file, error)


def local_files(folder: Path) -> tuple[Path, ...]:
    """The files at or below this folder that were imported so far, sorted."""
    root = folder.resolve()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(PREFIX)]
    files = {Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None))}
    return tuple(sorted(file for file in files if file.is_relative_to(root)))


def where(error: BaseException, folder: Path) -> str:
    """The user's own line that an exception came from, as "file.py, line 3", else ""."""
    root = folder.resolve()
    frames = [
        (file, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file() and (file := Path(frame.filename).resolve()).is_relative_to(root)
    ]
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.relative_to(root)}, line {line}"


def call(function: Any, *arguments: Any, reference: str, folder: Path, error: type[DeployError]) -> Any:
    """Calls the user's function; whatever it raises, sys.exit too, becomes `error` with the user's line.

    What it prints goes to stderr: stdout is the command's own.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*arguments)
    except (DeployError, KeyboardInterrupt):
        raise
    except BaseException as raised:  # sys.exit is no Exception
        raise _raised(reference, raised, folder, error) from raised


def _raised(what: str, raised: BaseException, folder: Path, error: type[DeployError]) -> DeployError:
    line = where(raised, folder)
    place = f" at {line}" if line else ""
    if isinstance(raised, SystemExit):
        return error(
            f"{what} called sys.exit{place}",
            found=f"SystemExit: {raised.code}",
            expected="a function that returns or raises",
            fix='keep what only a script does under if __name__ == "__main__"',
        )
    return error(
        f"{what} raised{place}",
        found=first_line(raised),
        expected="a function that returns",
        fix="run the file on its own to see the whole traceback",
    )


def _import(file: Path, error: type[DeployError]) -> ModuleType:
    name = f"{_package(file.parent)}.{file.stem}"
    if "." in file.stem:  # the import system would look for a package
        name = f"{_package(file.parent)}.{hashlib.sha256(os.fsencode(file.name)).hexdigest()[:12]}"
    _forget_changed(file.parent)
    if name in sys.modules:
        return sys.modules[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return _execute(name, file)
    except (DeployError, KeyboardInterrupt):
        raise
    except BaseException as raised:  # sys.exit is no Exception
        raise _raised(f"importing {file.name}", raised, file.parent, error) from raised


def _forget_changed(folder: Path) -> None:
    """Drops the modules of a folder when a file of theirs was edited since, as in a notebook."""
    prefix = _package_name(folder) + "."
    loaded = [name for name in sys.modules if name.startswith(prefix)]
    known = [name for name in loaded if name in _LOADED]
    if any(_LOADED[name] != _stamp(sys.modules[name].__file__) for name in known):
        for name in loaded:
            del sys.modules[name]


def _stamp(file: str | None) -> tuple[int, int] | None:
    try:
        status = os.stat(file or "")
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _execute(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _package_name(folder: Path) -> str:
    return PREFIX + hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]


def _package(folder: Path) -> str:
    """The private package that stands for a folder, made on first use."""
    name = _package_name(folder)
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    return name


class _Finder(MetaPathFinder):
    """Finds modules of the private packages only."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(PREFIX) or path is None:
            return None
        stem = fullname.rpartition(".")[2]
        for folder in path:
            package, plain = Path(folder) / stem / "__init__.py", Path(folder) / f"{stem}.py"
            for file, roots in ((package, [str(package.parent)]), (plain, None)):
                if file.is_file():
                    loader = _Loader(fullname, str(file))
                    return importlib.util.spec_from_file_location(
                        fullname, file, loader=loader, submodule_search_locations=roots
                    )
        return None


class _Loader(SourceFileLoader):
    """Runs a user's file with an `import` that looks beside the project's files first."""

    def exec_module(self, module: ModuleType) -> None:
        root = module.__name__.partition(".")[0]
        _LOADED[module.__name__] = _stamp(module.__file__)
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _sibling_import(root)}
        super().exec_module(module)

    def _cache_bytecode(self, *_: Any) -> None:
        """Leaves no __pycache__ in the user's folder."""


def _sibling_import(root: str) -> Any:
    folders = [Path(folder) for folder in sys.modules[root].__path__]

    def is_local(top: str) -> bool:
        return any(
            (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file() for folder in folders
        )

    def sibling_import(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - the signature of __import__
        locals: Mapping[str, Any] | None = None,  # noqa: A002 - the signature of __import__
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or not is_local(top):
            return builtins.__import__(name, globals, locals, fromlist, level)
        module = builtins.__import__(f"{root}.{name}", globals, locals, fromlist or ("__name__",), 0)
        return module if fromlist else sys.modules[f"{root}.{top}"]

    return sibling_import


def iterate(batches: Any, *, reference: str, folder: Path, error: type[DeployError]) -> Iterator[Any]:
    """What the user's iterable yields; whatever it raises becomes `error`."""
    iterator = iter(call(iter, batches, reference=reference, folder=folder, error=error))
    end = object()
    while (item := call(next, iterator, end, reference=reference, folder=folder, error=error)) is not end:
        yield item
