"""The folder a build leaves, replaced so that it holds one whole build at every moment."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from deploy.cache import disk_error
from targets.errors import MissingRequirementError, UsageError

MANIFEST = "manifest.json"
LOGS = "logs"
SCRATCH = ".new-"
WAIT_S = 0.2


@contextlib.contextmanager
def locked(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Holds the build folder for this process; a second build waits, and says so.

    The lock is the kernel's, on the folder itself: it leaves no file and dies with the process. A folder
    that was made for the lock and stayed empty is removed again.
    """
    made = _make(folder)
    handle = _acquire(folder, announce)
    try:
        yield
    finally:
        if made:
            for empty in made:
                with contextlib.suppress(OSError):
                    empty.rmdir()
        os.close(handle)


def publish(folder: Path, files: Mapping[str, Path | bytes], manifest: bytes) -> None:
    """Writes files by name (a path is copied), then the manifest, then removes what nobody names."""
    try:
        _sweep(folder)
        staged = {name: _stage(folder, name, content) for name, content in files.items()}
        last = _stage(folder, MANIFEST, manifest)
        for name in sorted(staged, key=lambda name: not _hashed(name)):
            os.replace(staged[name], folder / name)
        os.replace(last, folder / MANIFEST)
    except OSError as error:
        _sweep(folder)
        raise disk_error(error, folder) from error
    _remove_strangers(folder, {*files, MANIFEST})


def _hashed(name: str) -> bool:
    """Whether a file's name holds its content's hash: those can be written while an old build is read."""
    return "-" in Path(name).stem


def _stage(folder: Path, name: str, content: Path | bytes) -> Path:
    scratch = folder / f"{SCRATCH}{name.replace('/', '_')}"
    if isinstance(content, bytes):
        scratch.write_bytes(content)
    else:
        shutil.copyfile(content, scratch)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch.open("rb") as stream:
        os.fsync(stream.fileno())
    return scratch


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(f"{SCRATCH}*"):
        leftover.unlink(missing_ok=True)


def _remove_strangers(folder: Path, named: set[str]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        relative = path.relative_to(folder)
        if relative.parts[0] == LOGS or str(relative) in named:
            continue
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _make(folder: Path) -> list[Path]:
    """Makes the folder; returns what was made, innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise UsageError(
                    "the output folder cannot be made", found=f"{path} is a file", expected="a folder",
                    fix="choose another -o/--output-dir",
                )  # fmt: skip
            break
        missing.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    if not os.access(folder, os.W_OK):
        raise MissingRequirementError(
            f"cannot write to {folder}",
            expected="a folder that may be written to",
            fix="choose another -o/--output-dir",
        )
    return missing


def _acquire(folder: Path, announce: Callable[[str], None]) -> int:
    import fcntl

    told = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not told:
                announce(f"another build writes {folder}; waiting for it")
                told = True
            time.sleep(WAIT_S)
            continue
        if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
        os.close(handle)
