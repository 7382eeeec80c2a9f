"""A folder held by one process at a time, and the disk's refusals told."""

import threading
from pathlib import Path

import pytest

from deploy import disk
from targets.errors import MissingRequirementError, UsageError


def test_a_second_holder_waits_for_the_first_and_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with disk.locked(tmp_path / "out", lambda: told.append("waits")):
            order.append("second")

    with disk.locked(tmp_path / "out", lambda: told.append("waits")):
        other = threading.Thread(target=second)
        other.start()
        other.join(3 * disk.WAIT_S)
        assert other.is_alive()
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert told == ["waits"]


def test_a_folder_made_for_a_lock_and_left_empty_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk.locked(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_file_where_a_folder_is_expected_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"a (file|broken link)"), disk.locked(tmp_path / place):
        pytest.fail("the lock was given")


@pytest.mark.parametrize("place", ["/proc/edge-deploy", "n" * 300])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    with (
        pytest.raises(MissingRequirementError, match="cannot write"),
        disk.locked(tmp_path / place),
    ):
        pytest.fail("the lock was given")


def test_holders_that_make_and_remove_the_folder_in_turn_never_trip_over_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def often() -> None:
        try:
            for _ in range(60):
                with disk.locked(tmp_path / "a" / "out"):
                    pass
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "WAIT_S", 0.0)
        threads = [threading.Thread(target=often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
