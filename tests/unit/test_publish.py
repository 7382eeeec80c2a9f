"""The build folder: one whole build at every moment, whatever happens on the way to the next."""

import errno
import os
import signal
from pathlib import Path

import pytest

from deploy import publish
from targets.errors import MissingRequirementError, UsageError

OLD: dict[str, Path | bytes] = {
    "model-1.pte": b"old program",
    "plan.json": b"old plan",
    "rungs/a-1.pte": b"old rung",
}
NEW: dict[str, Path | bytes] = {
    "model-2.pte": b"new program",
    "plan.json": b"new plan",
    "rungs/a-2.pte": b"new rung",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old build."""
    folder = tmp_path / "out"
    folder.mkdir()
    publish.publish(folder, OLD, b"old manifest")
    return folder


def test_a_new_build_replaces_the_old_one_whole_and_logs_stay(folder: Path) -> None:
    (folder / "logs").mkdir()
    (folder / "logs" / "build.log").write_bytes(b"log")
    publish.publish(folder, NEW, b"new manifest")
    assert contents(folder) == {**NEW, "manifest.json": b"new manifest", "logs/build.log": b"log"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failure_while_writing_leaves_the_old_build_byte_for_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    before, calls, sync = contents(folder), [], os.fsync

    def failing(handle: int) -> None:
        calls.append(handle)
        if len(calls) == at:
            raise error
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(MissingRequirementError if isinstance(error, OSError) else type(error)):
        publish.publish(folder, NEW, b"new manifest")
    assert len(calls) == at
    assert contents(folder) == before


def test_a_ctrl_c_while_files_change_places_waits_until_they_have(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish.publish(folder, NEW, b"new manifest")
    assert contents(folder) == {**NEW, "manifest.json": b"new manifest"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_source_that_vanished_leaves_the_old_build(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    with pytest.raises(MissingRequirementError):
        publish.publish(folder, {**NEW, "model-2.pte": tmp_path / "gone"}, b"new manifest")
    assert contents(folder) == before


@pytest.mark.parametrize("place", ["plan.json", "manifest.json"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_changes(folder: Path, place: str) -> None:
    (folder / place).unlink()
    (folder / place).mkdir()
    before = contents(folder)
    with pytest.raises(UsageError, match="is a folder"):
        publish.publish(folder, NEW, b"new manifest")
    assert contents(folder) == before


def test_a_file_in_the_place_of_a_folder_is_told_before_anything_changes(tmp_path: Path) -> None:
    publish.publish(tmp_path, {"rungs": b"a file"}, b"manifest")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="rungs is a file"):
        publish.publish(tmp_path, NEW, b"new manifest")
    assert contents(tmp_path) == before
