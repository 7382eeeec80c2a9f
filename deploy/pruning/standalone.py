"""Loads the pruned model that lies beside this file. Needs torch and safetensors, nothing else.

    from load import load
    model = load(build)                  # build is the function that made the dense model

To train on from checkpoint.pt, where there is one:

    checkpoint = torch.load("checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.AdamW(model.parameters())        # made as before, from the pruned model
    optimizer.load_state_dict(checkpoint["optimizer"])
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
METADATA_KEY = "edge_deploy.architecture"
FORMAT_VERSION = 1


def load(factory: Callable[[], nn.Module], folder: str | Path | None = None) -> nn.Module:
    """The pruned model with its weights; `folder` is this file's own by default.

    `factory` returns the dense module, as it did when the model was pruned; its weights do not matter.
    Raises ValueError where the folder was not made from such a module.
    """
    file = (Path(folder) if folder is not None else Path(__file__).parent) / WEIGHTS
    delta, tensors = _read(file)
    module = copy.deepcopy(factory())
    _cut(module, delta)
    _assign(module, tensors)
    return module


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of what was cut, from the file's metadata, and the weights."""
    with safe_open(str(file), framework="pt") as stream:
        text = (stream.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"{file} holds no record of what was pruned (metadata {METADATA_KEY})")
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
    delta: dict[str, Any] = json.loads(text)
    if delta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{file} has format {delta.get('version')}, this loader reads {FORMAT_VERSION}")
    return delta, tensors


def _cut(module: nn.Module, delta: dict[str, Any]) -> None:
    """Gives the module's tensors and numbers (out_channels, ...) the pruned sizes. In place."""
    owners = _owners(module)
    for name, change in delta["tensors"].items():
        path, _, leaf = name.rpartition(".")
        tensor = getattr(_part(module, path), leaf, None)
        if not isinstance(tensor, Tensor) or list(tensor.shape) != change["before"]:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
            raise ValueError(f"{name} of the factory's module is {found}, not {change['before']}")
        smaller = tensor.detach()
        for dim, kept in change["kept"].items():
            index = torch.tensor(kept, dtype=torch.long, device=smaller.device)
            smaller = smaller.index_select(int(dim), index)
        _replace(owners[id(tensor)], tensor, smaller.contiguous())
    for path, numbers in delta["attributes"].items():
        for attribute, value in numbers.items():
            setattr(_part(module, path), attribute, value)


def _replace(owners: list[tuple[nn.Module, str]], tensor: Tensor, smaller: Tensor) -> None:
    """Puts the smaller tensor wherever the tensor is held: a tied weight stays tied."""
    parameter = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    for owner, name in owners:
        if isinstance(tensor, nn.Parameter):
            owner._parameters[name] = parameter
        else:
            owner._buffers[name] = smaller


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((part, name))
    return owners


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"the factory's module has no {path}") from error


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads the weights, in the dtypes they were saved in; a tied weight is stored once."""
    unknown = set(tensors)
    for names, own in _tied(module):
        stored = next((name for name in names if name in tensors), None)
        if stored is None:
            raise ValueError(f"{WEIGHTS} lacks {names[0]}")
        if tensors[stored].shape != own.shape:
            raise ValueError(f"{stored} is {list(tensors[stored].shape)}, not {list(own.shape)}")
        own.data = tensors[stored].to(own.device)
        unknown -= set(names)
    if unknown:
        raise ValueError(f"the factory's module has no {', '.join(sorted(unknown)[:5])}")


def _tied(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each distinct tensor of the state with all its names."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from groups.values()
