"""A bundle's files written: the folder whole or not at all, and an archive with the same bytes each time."""

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deploy.disk import writable
from targets.errors import UsageError

Content = Path | bytes
MARK = ".edge-deploy-bundle"
MODE = 0o644
EXECUTABLE = 0o755


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Writes the files into a new folder beside it, then puts that in its place.

    A folder that is there is replaced when it is an older bundle or empty. Raises UsageError for any other,
    and MissingRequirementError where it cannot be written.
    """
    folder = folder.absolute()
    _check(folder)
    with writable(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            scratch.chmod(EXECUTABLE)
            for name, content in {**files, MARK: b"Made by deploy bundle, which may replace it.\n"}.items():
                _write(scratch / name, content)
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                os.replace(folder, old / "bundle")
                os.replace(scratch, folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write_archive(file: Path, files: Mapping[str, Content], *, top: str) -> None:
    """A .tar.gz with the files below `top`: sorted, without times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            data = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size, info.mode = len(data), MODE
            archive.addfile(info, io.BytesIO(data))
    with writable(file.parent):
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as stream, gzip.GzipFile("", "wb", 9, stream, mtime=0) as packed:
                packed.write(buffer.getvalue())
            os.replace(scratch, file)
        finally:
            scratch.unlink(missing_ok=True)


def _check(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir())):
        return
    raise UsageError(
        "the bundle cannot be written there",
        found=f"{folder} is {'a folder with other files' if folder.is_dir() else 'a file or a link'}",
        expected="nothing, an empty folder, or an older bundle",
        fix="choose another -o",
    )


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)
    path.chmod(MODE)
