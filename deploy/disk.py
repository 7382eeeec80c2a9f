"""What a disk does to a program: it fills up, refuses, and is written to by two processes at once."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from targets.errors import MissingRequirementError, UsageError

WAIT_S = 0.2
OPEN_ATTEMPTS = 20
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def locked(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a folder for this process; a second one waits, and calls `on_wait` once when it has to.

    The lock is the kernel's, on the folder itself: it leaves no file and dies with the process. A folder
    that was made for the lock and stayed empty is removed again.
    """
    made = _make(folder)
    handle = _acquire(folder, on_wait)
    try:
        yield
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        os.close(handle)


@contextlib.contextmanager
def writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, root) from error


@contextlib.contextmanager
def disk_told_apart(root: Path) -> Iterator[None]:
    """Tells a full disk from what a stage raises by itself: libraries wrap it in exceptions of their own."""
    try:
        yield
    except MissingRequirementError:
        raise
    except Exception as error:
        cause = _disk_cause(error)
        if cause is None:
            raise
        raise disk_error(cause, root) from error


def _disk_cause(error: BaseException) -> OSError | None:
    """The error of a disk behind an exception, None where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRORS:
            return seen
        for number in DISK_ERRORS:  # Rust's spelling, as safetensors hands it on
            if f"(os error {number})" in str(seen):
                return OSError(number, os.strerror(number))
        seen = seen.__cause__ or seen.__context__
    return None


def disk_error(error: OSError, place: Path) -> MissingRequirementError:
    """A full disk or a folder that refuses, told with what to do."""
    return MissingRequirementError(
        f"cannot write to {place}",
        found=error.strerror or str(error),
        expected="a folder with room that may be written to",
        fix="free space, choose another -o/--output-dir, or set EDGE_DEPLOY_CACHE",
    )


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
    if not _writable(folder):
        raise MissingRequirementError(
            f"cannot write to {folder}",
            found="a folder that may not be written to",
            expected="one that may",
            fix="choose another -o/--output-dir",
        )
    return missing


def _writable(folder: Path) -> bool:
    """Asked of the opened folder: by its path it may be gone and there again in between."""
    handle = _open(folder)
    try:
        return os.access(".", os.W_OK, dir_fd=handle)
    finally:
        os.close(handle)


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


def _acquire(folder: Path, on_wait: Callable[[], None]) -> int:
    import fcntl

    told = False
    while True:
        handle = _open(folder)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not told:
                on_wait()
                told = True
            time.sleep(WAIT_S)
            continue
        except OSError as error:  # a file system without locks
            os.close(handle)
            raise disk_error(error, folder) from error
        if _is_at(folder, handle):
            return handle
        os.close(handle)


def _is_at(folder: Path, handle: int) -> bool:
    """Whether the opened folder is the one that lies there now."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


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
