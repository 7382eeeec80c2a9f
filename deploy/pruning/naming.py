"""Layers by the patterns that a person writes."""

import fnmatch
from collections.abc import Sequence

from torch import nn

from targets.errors import UsageError, nearest


def matching(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Paths of layers that a pattern names, by themselves or by a module that holds them."""
    paths = [path for path, _ in module.named_modules() if path]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        named = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not named:
            raise UsageError(
                "an exclude pattern matches no module",
                found=pattern,
                expected=f"a module's path, like {', '.join(nearest(pattern, paths))}",
                fix="correct the pattern, or remove it",
            )
        chosen.update(
            (path, None) for path in paths if any(path == one or path.startswith(f"{one}.") for one in named)
        )
    return tuple(chosen)
