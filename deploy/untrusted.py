"""What a torch checkpoint claims, held against its bytes before torch may act on it.

torch.load(weights_only=True) runs no foreign code, but it allocates what a file claims: a kilobyte can
ask for terabytes through a storage, a bytearray or a view. Here the pickle is read with stand-ins
that do nothing, and no tensor data is read.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from targets.errors import ModelError

MAX_PICKLE_BYTES = 64 << 20
SHOWN = 5
MAX_DIMENSIONS = 64
MAX_EXPANDED_BYTES = 16 << 20  # a view may repeat its storage (expand), within reason
ITEM_BYTES = {
    "UntypedStorage": 1, "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "ShortStorage": 2,
    "HalfStorage": 2, "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "LongStorage": 8,
    "DoubleStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip
PLAIN = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class _Kind:
    """The type of a storage, by the size of an element."""

    itemsize: int


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage, by its size in bytes."""

    bytes: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands for a tensor whose claim was checked."""


def read_claims(file: Path) -> None:
    """Raises ModelError when a checkpoint claims more than it holds or asks for more than tensors.

    Other exceptions mean that the pickle is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        sizes = _member_sizes(archive, file)
        index = f"{next(iter(sizes), '').partition('/')[0]}/data.pkl"
        if sizes.get(index, MAX_PICKLE_BYTES + 1) > MAX_PICKLE_BYTES:
            raise ModelError(
                f"{file.name} is no checkpoint",
                found=", ".join(list(sizes)[:SHOWN]) or "an empty archive",
                expected="data.pkl inside, of a sensible size",
            )
        pickled = archive.read(index)
    storages = {
        name.removeprefix(root): size
        for root in [index.removesuffix("data.pkl") + "data/"]
        for name, size in sizes.items()
        if name.startswith(root)
    }
    _Reader(pickled, storages, file.name).load()


def _member_sizes(archive: zipfile.ZipFile, file: Path) -> dict[str, int]:
    """The members' sizes, which must all fit into the file together."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"{file.name} is compressed", expected="members stored as torch.save stores them")
    total = file.stat().st_size
    claimed = sum(max(member.file_size, member.compress_size) for member in members)
    if claimed > total:
        raise _more(file.name, f"{total} bytes in all", f"{claimed} for its members")
    sizes = {member.filename: member.file_size for member in members}
    if len({name.casefold() for name in sizes}) != len(members):
        raise ModelError(f"{file.name} is no checkpoint", found="two members of one name", expected="one")
    return sizes


def _more(name: str, found: str, expected: str) -> ModelError:
    return ModelError(
        f"{name} claims more than it holds",
        found=found,
        expected=expected,
        fix="download or save it again; do not trust it if it was meant to be like this",
    )


_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # typeshed lacks the Python one


class _Reader(_Unpickler):  # type: ignore[misc]
    """The pure Python unpickler: the C one allocates memo and bytearrays by what the pickle claims."""

    def __init__(self, pickled: bytes, storages: Mapping[str, int], name: str) -> None:
        super().__init__(io.BytesIO(pickled))
        self._storages = storages
        self._name = name
        self.dispatch: dict[int, Callable[..., None]] = {
            **_Unpickler.dispatch,
            **{opcode[0]: _Reader.refuse for opcode in REFUSED_OPCODES},
            pickle.SETITEM[0]: _Reader.load_setitem,
            pickle.SETITEMS[0]: _Reader.load_setitems,
            pickle.BUILD[0]: _Reader.load_build,
        }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what a checkpoint needs; nothing else is ever looked up."""
        if module in ("torch", "torch.storage") and name in ITEM_BYTES:
            return _Kind(ITEM_BYTES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in STAND_INS:
            stand_in = STAND_INS[module, name]
            return lambda *arguments: stand_in(self._name, *arguments)
        raise ModelError(
            f"{self._name} asks for {module}.{name}, which is not run",
            expected="tensors and plain values alone",
            fix="load it where you trust it and save its state_dict as safetensors",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, when the bytes it claims are there."""
        _, kind, key, _, count = pid
        if not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage without a name or a size")
        claimed, real = count * kind.itemsize, self._storages.get(key)
        if real is None or not 0 <= claimed <= real:
            raise _more(self._name, f"{real} bytes", f"{claimed} for storage {key}")
        return _Storage(claimed, kind.itemsize)

    def load_setitem(self) -> None:
        """As pickle's, for plain keys: nested tuples can take forever to hash."""
        self._set(self.stack[-3], [self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        """As pickle's, for plain keys."""
        self._set(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def _set(self, target: Any, keys: list[Any]) -> None:
        if not isinstance(target, dict) or not all(isinstance(key, PLAIN) for key in keys):
            raise pickle.UnpicklingError("a mapping with keys that are no plain values")

    def load_build(self) -> None:
        """The attributes that a state dict carries beside its entries; nothing here needs them."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise pickle.UnpicklingError("attributes of what is no state dict")

    def refuse(self) -> None:
        """Opcodes that torch.save does not write."""
        raise pickle.UnpicklingError("an opcode that torch.save does not write")


REFUSED_OPCODES = (
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ,
    pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.FROZENSET, pickle.ADDITEMS, pickle.DICT,
)  # fmt: skip


def _tensor(
    name: str, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor and its versions. A view beyond its storage is refused."""
    numbers = (offset, *size, *stride)
    fits = len(size) == len(stride) <= MAX_DIMENSIONS and all(
        isinstance(number, int) and 0 <= number < 1 << 63 for number in numbers
    )
    if not fits:
        raise pickle.UnpicklingError("a tensor without a sensible shape")
    # Version 3 has a dtype where its storage has none.
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    itemsize = dtype.itemsize if dtype else storage.itemsize
    claimed = math.prod(size) * itemsize
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    reach = (offset + last + 1) * itemsize if claimed else 0
    if reach > storage.bytes or claimed > max(storage.bytes, MAX_EXPANDED_BYTES):
        raise _more(name, f"{storage.bytes} bytes in its storage", f"{claimed} for a tensor of shape {size}")
    return _Tensor()


def _set(name: str, items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(item, PLAIN) for item in items):
        raise pickle.UnpicklingError("a set of what is not plain")
    return set(items)


def _ordered(name: str, *arguments: Any) -> OrderedDict[Any, Any]:
    if arguments not in ((), ([],)):
        raise pickle.UnpicklingError("a mapping that torch.save does not write")
    return OrderedDict()


def _encoded(name: str, text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unusual encoding")
    return text.encode("latin-1")


def _first(name: str, value: Any, *rest: Any) -> Any:
    return value


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _first,
    ("torch", "device"): _first,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _encoded,
}
