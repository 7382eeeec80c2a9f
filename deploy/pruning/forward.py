"""Running a user's forward: its outputs as a flat list, and where it failed in the user's own words."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exporters.capture import user_line
from targets.errors import first_line


class ForwardError(Exception):
    """A forward pass raised: `where` is the module's path, `line` the user's source line."""

    def __init__(self, where: str, line: str, cause: BaseException) -> None:
        self.where = where
        self.line = line
        self.cause = cause
        super().__init__(f"{where} ({line}): {first_line(cause)}")


def forward_outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All tensors of the output (tuples, dictionaries, dataclasses), in order.

    Raises ForwardError.
    """
    with _running_modules(module) as stack:
        try:
            return flatten_tensors(module(*inputs))
        except Exception as error:
            raise ForwardError(
                stack[-1] if stack else "", user_line(error) or "a line of a library", error
            ) from error


def flatten_tensors(value: Any) -> list[Tensor]:
    """The tensors inside a nested output."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [tensor for item in fields for tensor in flatten_tensors(item)]
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return [value] if isinstance(value, Tensor) else []
    return [tensor for leaf in leaves for tensor in flatten_tensors(leaf)]


def call_order(
    module: nn.Module, inputs: tuple[Tensor, ...], kinds: tuple[type, ...]
) -> list[tuple[nn.Module, bool]]:
    """Modules of these kinds in the order they first run, each with whether it reads an input directly."""
    input_storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    order: dict[nn.Module, bool] = {}

    def note(part: nn.Module, arguments: tuple[Any, ...]) -> None:
        tensors = [item for item in arguments if isinstance(item, Tensor)]
        direct = any(tensor.untyped_storage().data_ptr() in input_storages for tensor in tensors)
        order.setdefault(part, direct)

    handles = [part.register_forward_pre_hook(note) for part in module.modules() if isinstance(part, kinds)]
    with _removing(handles), torch.no_grad():
        forward_outputs(module, inputs)
    return list(order.items())


@contextmanager
def _running_modules(module: nn.Module) -> Iterator[list[str]]:
    # The stack is popped on success only: after an exception its last entry is the module that raised.
    stack: list[str] = []
    handles: list[Any] = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(_pusher(stack, path or type(module).__name__)))
        handles.append(part.register_forward_hook(_popper(stack)))
    with _removing(handles):
        yield stack


@contextmanager
def _removing(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pusher(stack: list[str], path: str) -> Callable[..., None]:
    def push(_module: nn.Module, _inputs: Any) -> None:
        stack.append(path)

    return push


def _popper(stack: list[str]) -> Callable[..., None]:
    def pop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        stack.pop()

    return pop
