"""The folder a build leaves, replaced so that it holds one whole build at every moment."""

import contextlib
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from deploy.cache import disk_error
from targets.errors import MissingRequirementError, UsageError

MANIFEST = "manifest.json"
LOGS = "logs"
SCRATCH = ".new-"
WAIT_S = 0.2
OPEN_ATTEMPTS = 20


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
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        os.close(handle)


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


def _make(folder: Path) -> list[Path]:
    """Makes the folder; returns what was made, innermost first."""
    missing = []
    try:
        for path in (folder, *folder.parents):
            if _check_folder(path):
                break
            missing.append(path)
    except OSError as error:
        raise disk_error(error, folder) from error
    os.close(_open(folder))
    if not os.access(folder, os.W_OK) and folder.exists():
        raise MissingRequirementError(
            f"cannot write to {folder}",
            found="a folder that may not be written to",
            expected="one that may",
            fix="choose another -o/--output-dir",
        )
    return missing


def _check_folder(path: Path) -> bool:
    """Whether the folder is there, by one look: it may come and go. Raises UsageError for anything else."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return True
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
    raise UsageError(
        "the output folder cannot be made",
        found=f"{path} is {'a broken link' if path.is_symlink() else 'a file'}",
        expected="a folder",
        fix="choose another -o/--output-dir",
    )


def _acquire(folder: Path, announce: Callable[[str], None]) -> int:
    import fcntl

    told = False
    while True:
        handle = _open(folder)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not told:
                announce(f"another build writes {folder}; waiting for it")
                told = True
            time.sleep(WAIT_S)
            continue
        except OSError as error:  # a file system without locks
            os.close(handle)
            raise disk_error(error, folder) from error
        if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
        os.close(handle)


def _open(folder: Path) -> int:
    """A handle of the folder; tried again when another build removes it, still empty, in between."""
    for attempt in range(OPEN_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError) as error:
            if attempt == OPEN_ATTEMPTS - 1:
                raise disk_error(error, folder) from error
        except OSError as error:
            raise disk_error(error, folder) from error
    raise AssertionError("the last attempt returns or raises")
