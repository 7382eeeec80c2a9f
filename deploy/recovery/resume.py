"""Where training stands, on disk: written whole or not at all, and only read back for the same training."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from targets.errors import MissingRequirementError


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those outside state_dict, by path; shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Independent copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Writes saved values into the module's own tensors."""
    for name, tensor in tensors_of(module).items():
        tensor.copy_(saved[name])


def fingerprint(parts: Iterable[Mapping[str, Tensor | np.ndarray[Any, Any]]], settings: str) -> str:
    """A hash of everything that decides how training goes: tensors, data, settings, torch's version."""
    digest = hashlib.sha256(f"{settings} torch {torch.__version__}".encode())
    for part in parts:
        for name, value in part.items():
            digest.update(f"|{name} {value.dtype} {tuple(value.shape)}|".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Replaces the file by this state in one step; a crash leaves the old one.

    Raises MissingRequirementError where it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise MissingRequirementError(
            f"training's checkpoint cannot be written to {path}",
            found=error,
            fix="free some space there or choose another cache folder",
        ) from error


def load(path: Path, expected: str) -> dict[str, Any] | None:
    """The state in the file, None where there is none, it is damaged, or of another training."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises many kinds for a damaged file; training then starts anew
        return None
    if not isinstance(state, dict) or state.get("fingerprint") != expected:
        return None
    return state


def _bytes(value: Tensor | np.ndarray[Any, Any]) -> memoryview:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
