"""What a user's code and data hash to, known without importing the code again.

The first time a reference such as "model.py:build" is used, the project's files that it imported are
written down with their hashes; as long as they all agree, a later run need not import anything.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from calibration import sources
from deploy import usercode
from deploy.cache import digest, file_digest
from deploy.disk import disk_error
from targets.errors import UsageError


class CodeFingerprints:
    """Fingerprints of "file.py:name" references of one project folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root / "sources"
        self._folder = folder

    def of(self, reference: str, use: Callable[[], object]) -> str:
        """The fingerprint of all files behind a reference; `use` imports and runs it when that is unknown."""
        file = self._file(reference)
        known = _read(file)
        if known is not None and self._current(known) == known:
            return digest(known)
        use()
        names = {str(path.relative_to(self._folder.resolve())) for path in self._imported()}
        hashes = {name: file_digest(self._folder / name) for name in sorted(names)}
        _write(file, hashes)
        return digest(hashes)

    def _imported(self) -> list[Path]:
        folder = self._folder.resolve()
        files = [path.resolve() for path in usercode.local_files(self._folder)]
        return [path for path in files if path.is_relative_to(folder)]

    def _current(self, known: dict[str, str]) -> dict[str, str]:
        return {name: file_digest(self._folder / name) for name in known if (self._folder / name).is_file()}

    def _file(self, reference: str) -> Path:
        return self._root / hashlib.sha256(os.fsencode(f"{self._folder.resolve()}\0{reference}")).hexdigest()


def data_fingerprint(source: str, folder: Path, code: CodeFingerprints) -> str:
    """The hash of a data source: its files, or the code of the function that makes it."""
    if ".py:" in source:
        return code.of(source, lambda: usercode.load_attribute(source, folder, error=UsageError))
    return sources.fingerprint(source, folder)


def _read(file: Path) -> dict[str, str] | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return None


def _write(file: Path, hashes: dict[str, str]) -> None:
    scratch = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(msgspec.json.encode(hashes))
        os.replace(scratch, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise disk_error(error, file.parent) from error
