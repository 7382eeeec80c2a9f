"""The record of what pruning changed: enough to rebuild the architecture without the pruning code."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from targets.errors import IntegrityError, ModelError

METADATA_KEY = "edge_deploy.architecture"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 64 * 1024 * 1024


class TensorDelta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parameter or buffer: its shapes, and for each changed dimension the indices that stay."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: dict[int, tuple[int, ...]]


class ArchitectureDelta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What differs from the architecture that the user's factory returns.

    `attributes` maps a module's path to its changed integers (`out_channels`, `num_features`, ...);
    `tensors` maps a parameter's or buffer's name to its change. Names of shared modules and tied
    parameters are the first ones of `named_modules` and `named_parameters`. `parameters` are all
    parameter names in the order an optimizer sees them, changed or not.
    """

    version: int = FORMAT_VERSION
    attributes: dict[str, dict[str, int]] = {}
    tensors: dict[str, TensorDelta] = {}
    parameters: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> "ArchitectureDelta":
        """The delta that `to_json` wrote. Raises IntegrityError for anything else."""
        try:
            delta = msgspec.json.decode(text, type=ArchitectureDelta)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise IntegrityError(
                f"the architecture delta is damaged: {error}", fix="save the pruned model again"
            ) from error
        if delta.version != FORMAT_VERSION:
            raise IntegrityError(
                "the architecture delta has an unknown version",
                found=delta.version,
                expected=str(FORMAT_VERSION),
                fix="use the edge-deploy version that wrote it",
            )
        return delta


def apply_delta(module: nn.Module, delta: ArchitectureDelta) -> nn.Module:
    """A copy of the module in its smaller architecture, holding the surviving weights.

    Works on a fresh module (then load the pruned weights into it) and on the dense trained one (then
    it is the pruned model). Raises ModelError when the delta was made for another architecture.
    """
    result = copy_module(module)
    owners = _owners(result)
    for name, change in delta.tensors.items():
        _slice_tensor(result, name, change, owners)
    for path, attributes in delta.attributes.items():
        target = _submodule(result, path)
        for attribute, value in attributes.items():
            setattr(target, attribute, value)
    return result


def slice_kept(tensor: Tensor, change: TensorDelta) -> Tensor:
    """The surviving part of a tensor that has the shape `change.before`."""
    for dim, kept in change.kept.items():
        tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.long, device=tensor.device))
    return tensor


def save_pruned(module: nn.Module, delta: ArchitectureDelta, path: Path) -> None:
    """Weights as safetensors, with the delta in the file's metadata: one file that `load_pruned` reads."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for names, tensor in _aliases(module):
        tensors[names[0]] = tensor.detach().contiguous().clone()
    save_file(tensors, str(path), metadata={METADATA_KEY: delta.to_json()})


def load_pruned(factory: Callable[[], nn.Module], file: Path) -> nn.Module:
    """The pruned model: the factory's module in the architecture of the file, with its weights.

    Raises ModelError naming the keys that do not fit, IntegrityError for a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    delta = read_delta(file)
    module = apply_delta(factory(), delta)
    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise IntegrityError(f"{file} is damaged: {error}", fix="save the pruned model again") from error
    _assign(module, tensors, origin=str(file))
    return module


def read_delta(file: Path) -> ArchitectureDelta:
    """The delta in a safetensors file's metadata, read without loading the weights."""
    metadata = _read_header(file).get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, Mapping) else None
    if not isinstance(text, str):
        raise ModelError(
            f"{file} holds no architecture delta",
            expected=f"safetensors metadata with the key {METADATA_KEY}",
            fix="write the file with save_pruned, or load it as plain weights",
        )
    return ArchitectureDelta.from_json(text)


def copy_module(module: nn.Module) -> nn.Module:
    """A deep copy. Raises ModelError where the module holds something that cannot be copied."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(module).__name__} cannot be copied: {error}",
            expected="a module that copy.deepcopy accepts",
            fix="do not keep activations, generators or open files as attributes of the module",
        ) from error


def _read_header(file: Path) -> dict[str, object]:
    # The eight-byte length comes first and is believed only up to a cap and the file's own size.
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise IntegrityError(
                    f"{file} claims a header that cannot be right",
                    found=f"{length} bytes",
                    expected=f"at most {max(0, min(MAX_HEADER_BYTES, size - 8))} bytes",
                    fix="save the pruned model again",
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(
            f"cannot read {file}", found=error.strerror, fix="name the file that save_pruned wrote"
        ) from error
    except ValueError as error:
        raise IntegrityError(f"{file} is damaged: {error}", fix="save the pruned model again") from error
    return header if isinstance(header, dict) else {}


def _assign(module: nn.Module, tensors: dict[str, Tensor], *, origin: str) -> None:
    unknown = set(tensors)
    missing: list[str] = []
    misfits: list[str] = []
    for names, own in _aliases(module):
        stored = next((name for name in names if name in tensors), None)
        unknown -= set(names)
        if stored is None:
            missing.append(names[0])
        elif tensors[stored].shape != own.shape:
            misfits.append(f"{stored} {tuple(tensors[stored].shape)} instead of {tuple(own.shape)}")
        else:
            own.data = tensors[stored]
    problems = [
        f"{label}: {', '.join(sorted(keys)[:5])}{' ...' if len(keys) > 5 else ''}"
        for label, keys in (("missing", missing), ("unknown", list(unknown)), ("shape", misfits))
        if keys
    ]
    if problems:
        raise ModelError(
            f"the weights in {origin} do not fit the factory's module",
            found="; ".join(problems),
            expected="the architecture that was pruned",
            fix="pass the factory that made the dense model",
        )


def _aliases(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each distinct tensor of the state with all names that it goes by."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name} of the state is no tensor",
                found=type(tensor).__name__,
                expected="tensors",
                fix="drop get_extra_state from that module",
            )
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from groups.values()


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((part, name))
    return owners


def _slice_tensor(
    root: nn.Module, name: str, change: TensorDelta, owners: dict[int, list[tuple[nn.Module, str]]]
) -> None:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(_submodule(root, path), leaf, None)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(change.before):
        raise ModelError(
            "the architecture delta does not fit the factory's module",
            found=f"{name} {tuple(tensor.shape) if isinstance(tensor, Tensor) else 'is missing'}",
            expected=f"{name} {tuple(change.before)}",
            fix="pass the factory that made the dense model",
        )
    smaller = slice_kept(tensor.detach(), change).contiguous()
    parameter = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    for owner, attribute in owners[id(tensor)]:
        if isinstance(tensor, nn.Parameter):
            owner._parameters[attribute] = parameter
        else:
            owner._buffers[attribute] = smaller


def _submodule(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            "the architecture delta does not fit the factory's module",
            found=f"no module {path}",
            expected="the architecture that was pruned",
            fix="pass the factory that made the dense model",
        ) from error
