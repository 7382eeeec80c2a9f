"""Where samples come from: .npz, .safetensors, a folder of those, a user's function, or made up by name.

Sizes are read from the files' headers and checked before anything is allocated.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.dataset import Array, Dataset, check, synthetic
from calibration.preprocess import Preprocess
from calibration.spec import TensorSpec
from targets.errors import UsageError

SYNTHETIC = "synthetic"
LABEL = "label"
MAX_BYTES = 64 * 2**30
MAX_EXPANSION = 2000
CHUNK = 1 << 20


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

    `user_function` loads "file.py:name" references. Raises UsageError for what is missing or does not fit.
    """
    if source == SYNTHETIC:
        return synthetic(specs, samples=samples or 64, seed=seed)
    if ".py:" in source:
        if user_function is None:
            raise UsageError(f"{source} is a Python reference, which is not allowed here")
        arrays = _from_batches(user_function(source), source)
    else:
        arrays = _read(folder / source, source)
    return from_arrays(arrays, specs, origin=source, preprocessing=preprocessing).sample(samples, seed)


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
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise UsageError(f"{source} holds no data", expected=f"files ending in {', '.join(READERS)}")
        return files
    if not path.exists():
        raise UsageError(
            f"{source} is missing", found=f"no file at {path}", expected="the data that deploy.toml names"
        )
    if path.suffix not in READERS:
        raise UsageError(
            f"{source} is of no known kind",
            found=path.suffix or "no suffix",
            expected=f"{', '.join(READERS)}, a folder, file.py:function, or {SYNTHETIC!r}",
        )
    return [path]


def _read_file(file: Path) -> dict[str, Array]:
    try:
        return READERS[file.suffix](file)
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UsageError(
            f"{file.name} cannot be read",
            found=f"{type(error).__name__}: {error}",
            expected="arrays without pickles",
        ) from error


def _read_npz(file: Path) -> dict[str, Array]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
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
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        header = stream.tell()
    if dtype.hasobject or header + size != member.file_size:
        raise UsageError(
            f"{member.filename} of {file.name} does not hold what it claims",
            found=f"{member.file_size - header} bytes",
            expected=f"{size} bytes for shape {shape} of {dtype}",
        )
    if size > MAX_BYTES or member.file_size > MAX_EXPANSION * max(member.compress_size, 1):
        raise UsageError(
            f"{member.filename} of {file.name} is too large",
            found=f"{size} bytes",
            expected=f"at most {MAX_BYTES}",
        )


def _read_safetensors(file: Path) -> dict[str, Array]:
    """Plain safetensors by its specification: an 8-byte header length, JSON, then the data."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(total - 8, 100 << 20):
            raise UsageError(
                f"{file.name} is truncated or no safetensors file",
                found=f"a header of {length} bytes",
                expected=f"at most {total - 8}",
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
    dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
    if (
        not 0 <= start <= end <= len(data)
        or int(np.prod(entry["shape"], dtype=object)) * dtype.itemsize != end - start
    ):
        raise UsageError(
            f"{name!r} of {file.name} does not hold what it claims",
            found=entry,
            expected="offsets within the file",
        )
    return data[start:end].view(dtype).reshape(entry["shape"])


READERS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _from_batches(batches: Iterable[Mapping[str, Any]], source: str) -> dict[str, Array]:
    """Batches of arrays by name, or one mapping of arrays, joined."""
    parts = [batches] if isinstance(batches, Mapping) else list(batches)
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise UsageError(
            f"{source} gave no batches",
            found=type(batches).__name__,
            expected="mappings of arrays by input name",
        )
    names = parts[0].keys()
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in names}
