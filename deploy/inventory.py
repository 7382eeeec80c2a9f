"""What the cache holds, looked at without counting as use: sizes, ages, damage, and what may go."""

import time
from pathlib import Path

import msgspec

from deploy.cache import RECORD, Cache, Record, file_digest, folder_size
from deploy.manifest import Value

DAY_S = 86400.0


class Stored(Value, frozen=True, kw_only=True):
    """An entry: its stage (null where its record cannot be read), size, and when it was made and used.

    Times are seconds since 1970; `damage` says what is wrong, null where nothing was found.
    """

    key: str
    stage: str | None
    folder: str
    size_bytes: int
    seconds: float
    created: float
    last_used: float
    damage: str | None = None


class Size(Value, frozen=True, kw_only=True):
    """The cache in numbers."""

    root: str
    size_bytes: int
    entries: int


class Freed(Value, frozen=True, kw_only=True):
    """What a prune or a repair removed."""

    entries: int
    size_bytes: int


def size(cache: Cache) -> Size:
    """Bytes of everything below the cache's folder, and its number of entries."""
    total = folder_size(cache.root) if cache.root.is_dir() else 0
    return Size(root=str(cache.root), size_bytes=total, entries=len(_folders(cache)))


def stored(cache: Cache) -> list[Stored]:
    """Every entry, the longest unused first, its files not looked into."""
    return sorted((_look(folder) for folder in _folders(cache)), key=lambda entry: entry.last_used)


def damaged(cache: Cache) -> list[Stored]:
    """The entries whose record cannot be read, or whose files are not what it says."""
    looked_into = (
        msgspec.structs.replace(entry, damage=entry.damage or _wrong_file(Path(entry.folder)))
        for entry in stored(cache)
    )
    return [entry for entry in looked_into if entry.damage]


def remove(cache: Cache, entries: list[Stored]) -> Freed:
    """Removes these entries; they are made again when they are needed."""
    for entry in entries:
        cache.remove(Path(entry.folder))
    return Freed(entries=len(entries), size_bytes=sum(entry.size_bytes for entry in entries))


def remove_unused(cache: Cache, days: float) -> Freed:
    """Removes the entries that no build has used for so many days."""
    limit = time.time() - days * DAY_S
    return remove(cache, [entry for entry in stored(cache) if entry.last_used < limit])


def remove_all(cache: Cache) -> Freed:
    """Empties the cache, leftovers of dead builds and checkpoints too; the folder itself stays."""
    before = size(cache)
    cache.clear()
    return Freed(entries=before.entries, size_bytes=before.size_bytes - size(cache).size_bytes)


def _folders(cache: Cache) -> list[Path]:
    return [folder for folder in cache.root.glob("stages/??/*") if folder.is_dir()]


def _look(folder: Path) -> Stored:
    record, damage = _record(folder)
    file = folder / RECORD
    times = (file if file.is_file() else folder).stat()
    return Stored(
        key=folder.name,
        stage=record.stage if record else None,
        folder=str(folder),
        size_bytes=folder_size(folder),
        seconds=record.seconds if record else 0.0,
        created=record.created if record else times.st_mtime,
        last_used=times.st_mtime,
        damage=damage,
    )


def _record(folder: Path) -> tuple[Record | None, str | None]:
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Record), None
    except OSError as error:
        return None, f"{RECORD}: {error.strerror}"
    except msgspec.DecodeError as error:
        return None, f"{RECORD}: {error}"


def _wrong_file(folder: Path) -> str | None:
    """The first file that is missing, has other content, or is not in the record."""
    record, damage = _record(folder)
    if record is None:
        return damage
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {RECORD}
    for name, digest in record.files.items():
        if name not in present:
            return f"{name} is missing"
        if file_digest(folder / name) != digest:
            return f"{name} has other content than it had"
    strangers = sorted(present - record.files.keys())
    return f"{strangers[0]} was added" if strangers else None
