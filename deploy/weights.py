"""Weights from a file that may be foreign: nothing in it runs, and nothing it merely claims is allocated."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deploy.untrusted import read_claims
from targets.errors import ModelError, UsageError, first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
STATE_KEYS = ("model", "state_dict", "model_state_dict")
SHOWN = 5
LONGEST = 200


def load_weights(file: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a checkpoint by torch.load(weights_only=True).

    Raises UsageError when the file is missing and ModelError when it is damaged or hostile.
    """
    state = find_state(load_checkpoint(file))
    if state is None:
        raise ModelError(
            f"{file.name} holds no state dict",
            expected=f"tensors by name, or one of the keys {', '.join(STATE_KEYS)}",
            fix="save the module's state_dict()",
        )
    return state


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Everything a weights file or training checkpoint holds; tensors and plain values only."""
    if not file.is_file():
        raise UsageError(
            f"the weights {file.name} are missing",
            found=f"no file at {file}",
            expected="the file that deploy.toml names",
            fix="correct [model] weights, or put the file there; paths are relative to deploy.toml",
        )
    if file.suffix not in SUFFIXES:
        raise UsageError(
            f"{file.name} is of no known kind",
            found=file.suffix or "no suffix",
            expected=", ".join(SUFFIXES),
            fix="save the weights as safetensors",
        )
    try:
        return dict(load_file(file)) if file.suffix == ".safetensors" else _load_zip(file)
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the parsers' own classes of error; a panic in Rust is no Exception
        raise _damaged(file, error) from error


def find_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The state dict inside a checkpoint: the checkpoint itself, or under one of the usual keys."""
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return dict(checkpoint)
    for key in STATE_KEYS:
        inner = checkpoint.get(key)
        if (
            isinstance(inner, Mapping)
            and inner
            and all(isinstance(value, Tensor) for value in inner.values())
        ):
            return dict(inner)
    return None


def assign(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Loads a state dict into the module in place. Raises ModelError naming the keys that do not fit.

    A tied weight may be absent under all names but one, as safetensors leaves it.
    """
    own = _own_tensors(module, origin)
    state = {**_untouched_counters(own), **_tied(own, state), **state}
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shared = [name for name in own if name in state]
    unequal = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in shared
        if state[name].shape != own[name].shape
    ]
    unlike = [
        f"{name} {_dtype(state[name])} for {_dtype(own[name])}"
        for name in shared
        if _kind(state[name]) != _kind(own[name])
    ]
    wrong = [
        ("missing", missing), ("not in the model", unknown),
        ("of another shape", unequal), ("of another kind", unlike),
    ]  # fmt: skip
    found = "; ".join(f"{what}: {_some(names)}" for what, names in wrong if names)
    if found:
        raise ModelError(
            f"{origin} does not fit the model",
            found=found,
            expected=f"the {len(own)} tensors of the factory's module",
            fix="name the weights of this very architecture, or correct the factory",
        )
    try:
        module.load_state_dict(dict(state), strict=False)
    except Exception as error:  # a module may load its weights in its own way, and fail in any
        raise _unloadable(origin, error) from error
    check_finite(module, origin=origin)


def check_finite(module: nn.Module, *, origin: str) -> None:
    """Raises ModelError when a weight is NaN or infinite, or holds no values."""
    for name, value in _own_tensors(module, origin).items():
        if value.is_meta:
            raise ModelError(
                f"{origin} holds no values",
                found=f"{name} on the meta device",
                expected="weights in memory",
                fix="make the module on the CPU, or name its weights in [model]",
            )
        # Sparse and quantized tensors have no isfinite of their own.
        plain = value.is_floating_point() and value.layout is torch.strided and not value.is_quantized
        if plain and not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"{origin} holds NaN or infinity",
                found=f"in {name}",
                expected="finite weights",
                fix="train again with a smaller learning rate, or name a checkpoint from before it diverged",
            )


def _own_tensors(module: nn.Module, origin: str) -> dict[str, Tensor]:
    """The tensors of the module's state dict; what else it may hold (extra state) is the module's own."""
    try:
        tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        for value in tensors.values():
            _ = value.shape  # a lazy parameter raises here
    except Exception as error:  # as above: a module may give its weights in its own way
        raise _unloadable(origin, error) from error
    return tensors


def _unloadable(origin: str, error: Exception) -> ModelError:
    return ModelError(
        f"{origin} cannot be loaded into the model",
        found=first_line(error),
        expected="a module whose state_dict and load_state_dict agree",
        fix="run a lazy module once in the factory, or correct the module",
    )


def _untouched_counters(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch-norm's batch counters, which old checkpoints lack and evaluation never reads."""
    return {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")}


def _tied(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for names that share their memory with a name that is given."""
    places = {_place(own[name]): name for name in state if name in own and own[name].numel()}
    return {
        name: state[places[_place(value)]]
        for name, value in own.items()
        if name not in state and value.numel() and _place(value) in places
    }


def _place(value: Tensor) -> tuple[object, ...]:
    if value.is_meta or value.layout is not torch.strided:
        return (id(value),)
    return (value.data_ptr(), value.shape, value.stride(), value.dtype)


def _kind(value: Tensor) -> str:
    if value.dtype is torch.bool:
        return "bool"
    return "complex" if value.is_complex() else "float" if value.is_floating_point() else "integer"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _damaged(file: Path, error: BaseException) -> ModelError:
    return ModelError(
        f"the weights {file.name} cannot be loaded",
        found=first_line(error),
        expected="an undamaged safetensors file, or a checkpoint of tensors that loads with weights_only",
        fix="save it again, best as safetensors",
    )


def _load_zip(file: Path) -> dict[str, Any]:
    """torch.load(weights_only=True) after every claim of the file was held against its bytes."""
    if not zipfile.is_zipfile(file):
        raise ModelError(
            f"{file.name} is no checkpoint in torch's zip format",
            found="another format, or the old one that allocates what it claims",
            expected="a file of torch.save (torch 1.6 or newer), or safetensors",
            fix="load it where you trust it and save it again",
        )
    read_claims(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickle protocols that it then refuses
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{file.name} holds no mapping", found=type(loaded).__name__, expected="tensors by name"
        )
    return dict(loaded)
