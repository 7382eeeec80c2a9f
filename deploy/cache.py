"""Finished stages on disk, addressed by what went into them.

An entry is a folder that appears whole or not at all. Its record holds the ingredients of its key,
so that a later run can say what changed.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from deploy.disk import disk_told_apart, locked, writable

RECORD = "stage.json"
CHUNK = 1 << 20

Ingredients = Mapping[str, Any]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry was made from and what it holds."""

    stage: str
    ingredients: dict[str, Any]
    files: dict[str, str]
    sizes: dict[str, int] = {}
    seconds: float
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished stage: its folder, and how it came to be."""

    folder: Path
    stage: str
    cached: bool
    why: str
    seconds: float


class Cache:
    """Entries under one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(
        self,
        name: str,
        ingredients: Ingredients,
        make: Callable[[Path], None],
        *,
        slot: str,
        refresh: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Entry:
        """The entry for these ingredients, made by `make(folder)` when it is not there yet.

        Two processes that want the same entry make it once: the second waits for the first, and calls
        `on_wait`.
        `slot` names the place of this stage in a project, so that a run can be told from the one before.
        """
        key = digest({"stage": name, **ingredients})
        folder = self._folder(key)
        record = self._read(folder)
        if record and not refresh:
            return Entry(
                folder=folder, stage=name, cached=True, why="nothing it depends on changed", seconds=0.0
            )
        why = "the cache was not to be used" if refresh and record else self._explain(slot, ingredients)
        started = time.monotonic()
        with self.scratch() as scratch, locked(self.root / "making" / key, on_wait):
            cached = self._read(folder) is not None and not refresh
            if cached:
                why = "another build made it meanwhile"
            else:
                self._make(folder, name, ingredients, make, scratch / "entry")
        self._remember(slot, key)
        return Entry(folder=folder, stage=name, cached=cached, why=why, seconds=time.monotonic() - started)

    def find(self, name: str, ingredients: Ingredients) -> Path | None:
        """The folder of an entry, None where there is none."""
        folder = self._folder(digest({"stage": name, **ingredients}))
        return folder if self._read(folder) else None

    def entries(self) -> Iterator[tuple[Path, Record]]:
        """Every whole entry."""
        for folder in sorted(self.root.glob("stages/??/*")):
            if record := self._read(folder, touch=False):
                yield folder, record

    def remove(self, folder: Path) -> None:
        """Removes one entry, the record first so that no half of it is ever found."""
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Removes everything: entries, leftovers, what is known of sources, checkpoints, environments."""
        for part in ("stages", "tmp", "slots", "sources", "resume", "making", "isolated"):
            shutil.rmtree(self.root / part, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the cache's disk, removed afterwards."""
        with writable(self.root):
            parent = self.root / "tmp"
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _make(
        self, folder: Path, name: str, ingredients: Ingredients, make: Callable[[Path], None], work: Path
    ) -> None:
        started = time.monotonic()
        with writable(self.root):
            work.mkdir()
        with disk_told_apart(self.root):
            make(work)
        with writable(self.root):
            record = Record(
                stage=name,
                ingredients=dict(ingredients),
                files=_hashes(work),
                sizes={str(file.relative_to(work)): file.stat().st_size for file in _files(work)},
                seconds=time.monotonic() - started,
                created=time.time(),
            )
            (work / RECORD).write_bytes(msgspec.json.encode(record))
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._replace(work, folder)

    def _replace(self, work: Path, folder: Path) -> None:
        """Puts a finished entry in its place; another process's equal one may already stand there."""
        if folder.exists():
            self.remove(folder)
        try:
            os.replace(work, folder)
        except OSError:
            if not (folder / RECORD).exists():
                raise

    def _folder(self, key: str) -> Path:
        return self.root / "stages" / key[:2] / key

    def _read(self, folder: Path, *, touch: bool = True) -> Record | None:
        """The record of a whole entry; touches it, so that unused entries can be told."""
        file = folder / RECORD
        try:
            record = msgspec.json.decode(file.read_bytes(), type=Record)
            whole = all((folder / name).is_file() for name in record.files) and all(
                (folder / name).stat().st_size == size for name, size in record.sizes.items()
            )
        except (OSError, ValueError):  # a damaged record, or one of another version
            return None
        if whole and touch:
            with contextlib.suppress(OSError):
                os.utime(file)
        return record if whole else None

    def _slot(self, slot: str) -> Path:
        return self.root / "slots" / hashlib.sha256(os.fsencode(slot)).hexdigest()

    def _remember(self, slot: str, key: str) -> None:
        file = self._slot(slot)
        with writable(self.root):
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            try:
                scratch.write_text(key)
                os.replace(scratch, file)
            finally:
                scratch.unlink(missing_ok=True)

    def _explain(self, slot: str, ingredients: Ingredients) -> str:
        """Which ingredients differ from those of this slot's last run."""
        try:
            key = self._slot(slot).read_text(errors="replace")
        except OSError:
            return "it had not run yet"
        before = self._read(self._folder(key), touch=False)
        if before is None:
            return "its last result is no longer in the cache"
        known = msgspec.json.decode(msgspec.json.encode(dict(ingredients)))
        changed = sorted(
            k for k in known.keys() | before.ingredients.keys() if known.get(k) != before.ingredients.get(k)
        )
        return f"changed: {', '.join(changed)}" if changed else "it was asked for in another way"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, the same for the same content."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    hasher = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile counts nothing."""
    size = 0
    for file in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file_digest(file) for file in _files(folder) if file.name != RECORD
    }


def _sweep(parent: Path) -> None:
    """Removes what dead processes left."""
    for folder in parent.iterdir():
        pid = folder.name.partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
