"""The user's own Python files, loaded by path under a private name.

A project's files may import their siblings and may be called deploy.py or calibration.py: inside
them, and only there, a name is looked for beside them first. Nothing is put on sys.path.
"""

import builtins
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from targets.errors import DeployError, ModelError, UsageError, nearest

PREFIX = "_edge_deploy_user_"


def load_attribute(reference: str, folder: Path, *, error: type[DeployError] = ModelError) -> Any:
    """What "file.py:name" names. Raises `error` when the file raises, UsageError when it lacks the name."""
    file_name, _, attribute = reference.partition(":")
    file = folder / file_name
    if not attribute or file.suffix != ".py":
        raise UsageError("a Python reference does not fit", found=repr(reference), expected='"file.py:name"')
    if not file.is_file():
        raise UsageError(
            f"{file_name} is missing", found=f"no file at {file}", expected=f"the file of {reference!r}"
        )
    module = _import(file, error)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UsageError(
            f"{file_name} has no {attribute!r}",
            found=", ".join(nearest(attribute, public)) or "nothing",
            expected=f"a function called {attribute}",
        )
    return getattr(module, attribute)


def local_files(folder: Path) -> tuple[Path, ...]:
    """The files of this folder that were imported so far, sorted."""
    package = _package_name(folder)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(package + ".")]
    files = {Path(module.__file__) for module in modules if getattr(module, "__file__", None)}
    return tuple(sorted(files))


def where(error: BaseException, folder: Path) -> str:
    """The user's own line that an exception came from, as "file.py, line 3", else ""."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(folder)
    ]
    return f"{Path(frames[-1].filename).relative_to(folder)}, line {frames[-1].lineno}" if frames else ""


def call(function: Any, *arguments: Any, reference: str, folder: Path, error: type[DeployError]) -> Any:
    """Calls the user's function; whatever it raises, sys.exit too, becomes `error` with the user's line."""
    try:
        return function(*arguments)
    except DeployError:
        raise
    except (Exception, SystemExit) as raised:
        raise _raised(reference, raised, folder, error) from raised


def _raised(what: str, raised: BaseException, folder: Path, error: type[DeployError]) -> DeployError:
    line = where(raised, folder)
    place = f" at {line}" if line else ""
    text = str(raised).strip().splitlines()
    detail = f": {text[0]}" if text else ""
    return error(
        f"{what} raised{place}",
        found=f"{type(raised).__name__}{detail}",
        fix="run the file on its own to see the whole traceback",
    )


def _import(file: Path, error: type[DeployError]) -> ModuleType:
    folder = file.parent
    name = f"{_package(folder)}.{file.stem}"
    try:
        return importlib.import_module(name)
    except DeployError:
        raise
    except (Exception, SystemExit) as raised:
        sys.modules.pop(name, None)
        raise _raised(f"importing {file.name}", raised, folder, error) from raised


def _package_name(folder: Path) -> str:
    return PREFIX + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


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
