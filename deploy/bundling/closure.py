"""The modules of this project that a program needs, found by reading their imports."""

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.environment import OWN_PACKAGES


def closure(roots: Sequence[str]) -> dict[str, Path]:
    """The files of these modules and of all of ours that they import, by path in a package tree.

    Imports for typing alone do not count. Packages get their own __init__.py only where a module needs what
    is in it; elsewhere the bundle writes an empty one.
    """
    found: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if file is None or name in found:
            continue
        found[name] = file
        if file.name != "__init__.py" or name in roots:
            waiting += [each for each in _imports(file) if each.partition(".")[0] in OWN_PACKAGES]
    return {_place(name, file): file for name, file in sorted(found.items())}


def _file(name: str) -> Path | None:
    """The source file of a module, None for a name inside a module."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(file: Path) -> Iterator[str]:
    for node in _run(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: not the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run(child)


def _place(name: str, file: Path) -> str:
    path = name.replace(".", "/")
    return f"{path}/__init__.py" if file.name == "__init__.py" else f"{path}.py"
