"""Weights from a file that may be foreign: nothing in it runs, and nothing it merely claims is allocated."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from targets.errors import ModelError, UsageError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
STATE_KEYS = ("model", "state_dict", "model_state_dict")
SHOWN = 5
MAX_PICKLE_BYTES = 64 << 20


def load_weights(file: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a checkpoint by torch.load(weights_only=True).

    Raises UsageError when the file is missing and ModelError when it is damaged or hostile.
    """
    state = find_state(load_checkpoint(file))
    if state is None:
        raise ModelError(
            f"{file.name} holds no state dict",
            expected=f"tensors by name, or one of the keys {', '.join(STATE_KEYS)}",
        )
    return state


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Everything a weights file or training checkpoint holds; tensors and plain values only."""
    if not file.is_file():
        raise UsageError(
            f"the weights {file.name} are missing",
            found=f"no file at {file}",
            expected="the file that deploy.toml names",
        )
    if file.suffix not in SUFFIXES:
        raise UsageError(
            f"{file.name} is of no known kind", found=file.suffix or "no suffix", expected=", ".join(SUFFIXES)
        )
    try:
        return dict(load_file(file)) if file.suffix == ".safetensors" else _load_zip(file)
    except ModelError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError) as error:
        raise _damaged(file, error) from error
    except Exception as error:  # the unpickler's own classes of error
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
    """Loads a state dict into the module in place. Raises ModelError naming the keys that do not fit."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    unequal = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong = [("missing", missing), ("not in the model", unknown), ("of another shape", unequal)]
    found = "; ".join(f"{what}: {_some(names)}" for what, names in wrong if names)
    if found:
        raise ModelError(
            f"{origin} does not fit the model",
            found=found,
            expected=f"the {len(own)} tensors of the factory's module",
            fix="name the weights of this very architecture, or correct the factory",
        )
    module.load_state_dict(dict(state))
    check_finite(module, origin=origin)


def check_finite(module: nn.Module, *, origin: str) -> None:
    """Raises ModelError when a weight is NaN or infinite."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{origin} holds NaN or infinity", found=f"in {name}", expected="finite weights")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _damaged(file: Path, error: BaseException) -> ModelError:
    text = str(error).strip().splitlines()
    return ModelError(
        f"the weights {file.name} cannot be loaded",
        found=f"{type(error).__name__}: {text[0][:200] if text else ''}",
        expected="an undamaged safetensors file, or a checkpoint of tensors that loads with weights_only",
        fix="save it again, best as safetensors",
    )


def _load_zip(file: Path) -> dict[str, Any]:
    """torch.load(weights_only=True) after every storage's claim was held against its bytes."""
    if not zipfile.is_zipfile(file):
        raise ModelError(
            f"{file.name} is no checkpoint in torch's zip format",
            found="another format, or the old one that allocates what it claims",
            expected="a file of torch.save (torch 1.6 or newer), or safetensors",
            fix="load it where you trust it and save it again",
        )
    _check_storages(file)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{file.name} holds no mapping", found=type(loaded).__name__, expected="tensors by name"
        )
    return dict(loaded)


def _check_storages(file: Path) -> None:
    """Reads the pickle with torch's restricted unpickler, which runs nothing, and no tensor data."""
    from torch._weights_only_unpickler import Unpickler

    with zipfile.ZipFile(file) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ModelError(
                f"{file.name} is compressed", expected="members stored as torch.save stores them"
            )
        index = next((name for name in sizes if name.endswith("/data.pkl")), None)
        if index is None or sizes[index] > MAX_PICKLE_BYTES:
            raise ModelError(
                f"{file.name} is no checkpoint",
                found=", ".join(list(sizes)[:SHOWN]),
                expected="data.pkl inside",
            )
        pickled = archive.read(index)
    root = index.removesuffix("data.pkl")

    def storage(saved: tuple[Any, ...]) -> Any:
        _, kind, key, _, count = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        claimed, real = int(count) * dtype.itemsize, sizes.get(f"{root}data/{key}")
        if real is None or claimed > real:
            raise ModelError(
                f"{file.name} claims more than it holds",
                found=f"{real} bytes",
                expected=f"{claimed} for storage {key}",
            )
        return torch.storage.TypedStorage(
            wrap_storage=torch.UntypedStorage(claimed, device="meta"), dtype=dtype, _internal=True
        )

    reader = Unpickler(io.BytesIO(pickled))
    reader.persistent_load = storage
    reader.load()
