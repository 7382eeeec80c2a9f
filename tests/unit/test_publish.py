"""The build folder: one whole build at every moment, whatever happens on the way to the next."""

import errno
import os
import signal
import threading
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


def test_a_second_build_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with publish.locked(tmp_path / "out", told.append):
            order.append("second")

    with publish.locked(tmp_path / "out", told.append):
        other = threading.Thread(target=second)
        other.start()
        other.join(3 * publish.WAIT_S)
        assert other.is_alive()
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert len(told) == 1
    assert "waiting" in told[0]


def test_a_folder_made_for_a_build_that_failed_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish.locked(tmp_path / "a" / "b" / "c", print):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_file_where_a_folder_is_expected_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"a (file|broken link)"), publish.locked(tmp_path / place, print):
        pytest.fail("the lock was given")


@pytest.mark.parametrize("place", ["/proc/edge-deploy", "n" * 300])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    with (
        pytest.raises(MissingRequirementError, match="cannot write"),
        publish.locked(tmp_path / place, print),
    ):
        pytest.fail("the lock was given")


def test_builds_that_make_and_remove_the_folder_in_turn_never_trip_over_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def often() -> None:
        try:
            for _ in range(60):
                with publish.locked(tmp_path / "a" / "out", lambda text: None):
                    pass
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "WAIT_S", 0.0)
        threads = [threading.Thread(target=often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
