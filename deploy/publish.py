"""The folder a build leaves, replaced so that it holds one whole build at every moment."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.disk import disk_error
from targets.errors import UsageError

MANIFEST = "manifest.json"
LOGS = "logs"
SCRATCH = ".new-"


def publish(folder: Path, files: Mapping[str, Path | bytes], manifest: bytes) -> None:
    """Writes files by name (a path is copied), then the manifest, then removes what nobody names.

    Until all are written nothing of the last build is touched; a Ctrl-C waits while they change places.
    """
    for name in (*files, MANIFEST):
        _check_place(folder, folder / name)
    try:
        _sweep(folder)
        staged = {name: _stage(folder, name, content) for name, content in files.items()}
        last = _stage(folder, MANIFEST, manifest)
        with _uninterrupted():
            for name in sorted(staged, key=lambda name: not _hashed(name)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged[name], folder / name)
            os.replace(last, folder / MANIFEST)
            _remove_strangers(folder, {*files, MANIFEST})
    except BaseException as error:
        _sweep(folder)
        if isinstance(error, OSError):
            raise disk_error(error, folder) from error
        raise


def _check_place(folder: Path, place: Path) -> None:
    """A folder in the place of a file would stop a build half-way."""
    if place.is_dir() and not place.is_symlink():
        raise UsageError(
            "the build cannot be published",
            found=f"{place} is a folder",
            expected="a file, or nothing",
            fix="remove it, or choose another -o/--output-dir",
        )
    parent = place.parent
    if parent != folder and parent.exists() and not parent.is_dir():
        raise UsageError(
            "the build cannot be published",
            found=f"{parent} is a file",
            expected="a folder, or nothing",
            fix="remove it, or choose another -o/--output-dir",
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is done; only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def _hashed(name: str) -> bool:
    """Whether a file's name holds its content's hash: those can be written while an old build is read."""
    return "-" in Path(name).stem


def _stage(folder: Path, name: str, content: Path | bytes) -> Path:
    scratch = folder / f"{SCRATCH}{name.replace('/', '_')}"
    if isinstance(content, bytes):
        scratch.write_bytes(content)
    else:
        shutil.copyfile(content, scratch)
    with scratch.open("rb") as stream:
        os.fsync(stream.fileno())
    return scratch


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _remove_strangers(folder: Path, named: set[str]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        relative = path.relative_to(folder)
        if relative.parts[0] == LOGS or str(relative) in named:
            continue
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
