"""Where samples come from: .npz, .safetensors, a folder of those, a user's function, or made up by name.

Sizes are read from the files' headers and checked before anything is allocated.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.dataset import Array, Dataset, check, synthetic
from calibration.preprocess import Preprocess
from calibration.spec import TensorSpec
from targets.errors import UsageError, first_line

SYNTHETIC = "synthetic"
LABEL = "label"
MAX_BYTES = 64 * 2**30
MAX_EXPANSION = 2000
CHUNK = 1 << 20
LONGEST = 200


def load(
    source: str,
    folder: Path,
    specs: Sequence[TensorSpec],
    *,
    samples: int | None = None,
    preprocessing: Mapping[str, Preprocess] | None = None,
    seed: int = 0,
    user_function: Callable[[str], Any] | None = None,
) -> Dataset:
    """The samples that a `source` of deploy.toml names, checked against the inputs.

    Of batches from a user's function the first `samples` are taken, so that it may go on for ever; of
    anything else a seeded choice.
    `user_function` loads "file.py:name" references. Raises UsageError for what is missing or does not fit.
    """
    if source == SYNTHETIC:
        return synthetic(specs, samples=samples or 64, seed=seed)
    if ".py:" in source:
        if user_function is None:
            raise UsageError(f"{source} is a Python reference, which is not allowed here")
        arrays = _from_batches(user_function(source), source, samples)
    else:
        arrays = _read(folder / source, source)
    return from_arrays(arrays, specs, origin=source, preprocessing=preprocessing).sample(samples, seed)


def read_arrays(source: str, folder: Path) -> dict[str, Array]:
    """Every array of a file or folder, unchecked against any input. Raises UsageError as `load` does."""
    return _read(folder / source, source)


def from_arrays(
    arrays: Mapping[str, Array],
    specs: Sequence[TensorSpec],
    *,
    origin: str,
    preprocessing: Mapping[str, Preprocess] | None = None,
) -> Dataset:
    """A checked dataset from arrays named after the inputs; `label` holds the targets."""
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"{origin} lacks {', '.join(repr(name) for name in missing)}",
            found=f"arrays {', '.join(sorted(arrays)) or 'none'}",
            expected="one array for each input, named after it",
            fix="rename the arrays, or the tables [inputs.NAME]",
        )
    return check(
        Dataset(
            origin=origin,
            inputs={spec.name: arrays[spec.name] for spec in specs},
            specs=tuple(specs),
            labels=arrays.get(LABEL),
            preprocessing=preprocessing or {},
        )
    )


def fingerprint(source: str, folder: Path) -> str:
    """SHA-256 of the files behind a source; a user's function counts by its own files, elsewhere."""
    digest = hashlib.sha256(source.encode())
    path = folder / source
    if source == SYNTHETIC or ".py:" in source:
        return digest.hexdigest()
    for file in _files(path, source):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path, source: str) -> dict[str, Array]:
    parts = [_read_file(file) for file in _files(path, source)]
    if len(parts) == 1:
        return parts[0]
    names = set(parts[0])
    if any(set(part) != names for part in parts):
        raise UsageError(f"the files of {source} hold different arrays", expected=", ".join(sorted(names)))
    return {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}


def _files(path: Path, source: str) -> list[Path]:
    try:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise UsageError(
            f"{source} cannot be read", found=error.strerror, expected="a folder of data"
        ) from error
    if path.is_dir():
        files = [file for file in found if file.suffix in READERS and file.is_file()]
        if not files:
            raise UsageError(
                f"{source} holds no data",
                found="a folder",
                expected=f"files ending in {', '.join(READERS)}",
                fix="put the data there, or name their file",
            )
        return files
    if not path.exists():
        raise UsageError(
            f"{source} is missing",
            found=f"no file at {path}",
            expected="the data that deploy.toml names",
            fix="correct the source, or put the file there; paths are relative to deploy.toml",
        )
    if path.suffix not in READERS or not path.is_file():
        raise UsageError(
            f"{source} is of no known kind",
            found=(path.suffix or "no suffix") if path.is_file() else "no regular file",
            expected=f"{', '.join(READERS)}, a folder, file.py:function, or {SYNTHETIC!r}",
            fix="save the arrays with numpy.savez, named after the inputs",
        )
    return [path]


def _read_file(file: Path) -> dict[str, Array]:
    try:
        return READERS[file.suffix](file)
    except UsageError:
        raise
    except Exception as error:  # zipfile, zlib, json, ast and numpy raise many kinds for a damaged file
        raise UsageError(
            f"{file.name} cannot be read",
            found=first_line(error),
            expected="an undamaged file of arrays without pickles",
            fix="save it again, with numpy.savez or as safetensors",
        ) from error


def _read_npz(file: Path) -> dict[str, Array]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        packed = sum(member.compress_size for member in members)
        if packed > file.stat().st_size:
            raise _more(file, "its members", found=file.stat().st_size, claimed=packed)
        for member in members:
            _check_member(archive, member, file)
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> None:
    """The header of an array must agree with the bytes that are there."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
        size = math.prod(shape) * dtype.itemsize
        header = stream.tell()
    if min((0, *shape)) < 0 or dtype.hasobject or header + size != member.file_size:
        what = f"{member.filename} with shape {_short(shape)} of {_short(dtype)}"
        raise _more(file, what, found=member.file_size - header, claimed=size)
    if size > MAX_BYTES or member.file_size > MAX_EXPANSION * max(member.compress_size, 1):
        raise UsageError(
            f"{member.filename} of {file.name} is too large",
            found=f"{size} bytes from {member.compress_size}",
            expected=f"at most {MAX_BYTES}, and {MAX_EXPANSION} times what is stored",
            fix="split it into several files in a folder",
        )


def _more(file: Path, what: str, *, found: int, claimed: int) -> UsageError:
    return UsageError(
        f"{file.name} does not hold what it claims",
        found=f"{found} bytes",
        expected=f"{_short(claimed)} bytes for {what}",
        fix="save it again",
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _read_safetensors(file: Path) -> dict[str, Array]:
    """Plain safetensors by its specification: an 8-byte header length, JSON, then the data."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(total - 8, 100 << 20):
            raise UsageError(
                f"{file.name} is truncated or no safetensors file",
                found=f"a header of {length} bytes",
                expected=f"at most {max(total - 8, 0)}",
                fix="save it again",
            )
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = np.fromfile(stream, dtype=np.uint8)
    return {name: _tensor(name, entry, data, file) for name, entry in header.items()}


SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _tensor(name: str, entry: Mapping[str, Any], data: Array, file: Path) -> Array:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise UsageError(
            f"{name!r} of {file.name} has a dtype that numpy lacks",
            found=entry["dtype"],
            expected=", ".join(SAFETENSORS_DTYPES),
        )
    start, end = entry["data_offsets"]
    shape, dtype = entry["shape"], np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
    sensible = all(type(size) is int and size >= 0 for size in (*shape, start, end))
    if not sensible or not start <= end <= len(data) or math.prod(shape) * dtype.itemsize != end - start:
        raise UsageError(
            f"{name!r} of {file.name} does not hold what it claims",
            found=_short(entry),
            expected=f"offsets within the file's {len(data)} bytes that fit the shape",
            fix="save it again",
        )
    return data[start:end].view(dtype).reshape(shape)


READERS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _from_batches(batches: Any, source: str, samples: int | None) -> dict[str, Array]:
    """Batches of arrays by name, or one mapping of arrays, joined; as many as make up `samples`."""
    parts: list[dict[str, Array]] = []
    count = size = 0
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        parts.append(_batch(batch, parts[0] if parts else None, source))
        count += min(len(array) if array.ndim else 1 for array in parts[-1].values())
        size += sum(array.nbytes for array in parts[-1].values())
        if size > MAX_BYTES:
            raise UsageError(
                f"{source} gives too much data",
                found=f"{size} bytes and more",
                expected=f"at most {MAX_BYTES}",
                fix="set samples, or end the function",
            )
        if samples is not None and count >= samples and not isinstance(batches, Mapping):
            break
    if not parts:
        raise UsageError(
            f"{source} gave no batches", expected="mappings of arrays by input name", fix="yield at least one"
        )
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise UsageError(
            f"the batches of {source} do not fit together",
            found=str(error),
            expected="arrays that differ in their first dimension alone",
        ) from error


def _batch(batch: Any, first: Mapping[str, Array] | None, source: str) -> dict[str, Array]:
    """One batch as arrays by name, with the names of the first one."""
    if not isinstance(batch, Mapping) or not batch or (first is not None and batch.keys() != first.keys()):
        raise UsageError(
            f"{source} gave something other than batches",
            found=_short(list(batch)) if isinstance(batch, Mapping) else type(batch).__name__,
            expected=f"mappings of {', '.join(first)}" if first else "mappings of arrays by input name",
            fix="yield dictionaries such as {'image': array, 'label': array}",
        )
    try:
        return {str(name): np.asarray(array) for name, array in batch.items()}
    except Exception as error:  # whatever a user's object does when it is made an array
        raise UsageError(
            f"{source} gave what is no array",
            found=f"{type(error).__name__}: {_short(error)}",
            expected="numpy arrays",
        ) from error
