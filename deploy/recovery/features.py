"""Inner outputs of student and teacher that can be compared: same module path, same shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

MOST_PAIRS = 6

Outputs = dict[str, Tensor]


@contextmanager
def recorded(module: nn.Module, names: list[str]) -> Iterator[Outputs]:
    """While open, the latest tensor that each named submodule returned, by name."""
    outputs: Outputs = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def comparable(
    student: nn.Module, teacher: nn.Module, run: Callable[[nn.Module], Any], most: int = MOST_PAIRS
) -> list[str]:
    """Paths of submodules whose outputs have the same shape in both, in the order they are called.

    `run(module)` makes one forward pass. Blocks (modules with children) are taken where there are any,
    else single layers; `most` of them at most, evenly over the depth, the last always. Modules that are
    called more than once in a pass, or return anything but one floating-point tensor with at least two
    axes, are left out.
    """
    mine, theirs = _shapes(student, run), _shapes(teacher, run)
    agreeing = [name for name, shape in mine.items() if theirs.get(name) == shape]
    blocks = [name for name in agreeing if any(True for _ in student.get_submodule(name).children())]
    chosen = blocks or agreeing
    if len(chosen) <= most:
        return chosen
    return [chosen[round((index + 1) * len(chosen) / most) - 1] for index in range(most)]


def _shapes(module: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, tuple[int, ...]]:
    """The output shape of every submodule that is called exactly once, by path."""
    calls: dict[str, list[Any]] = {}
    handles = [
        child.register_forward_hook(
            lambda _module, _inputs, output, name=name: calls.setdefault(name, []).append(output)
        )
        for name, child in module.named_modules()
        if name
    ]
    try:
        run(module)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(seen[0].shape) for name, seen in calls.items() if len(seen) == 1 and _usable(seen[0])}


def _usable(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2
