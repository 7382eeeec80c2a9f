"""The cache: entries appear whole or not at all, damage is seen, and a full disk is told as one."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy import inventory
from deploy.cache import RECORD, Cache, Entry, folder_size
from targets.errors import MissingRequirementError, ModelError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_one(folder: Path) -> None:
    (folder / "result").write_bytes(b"one")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_finished_stage_is_not_made_again_and_a_changed_one_says_what_changed(cache: Cache) -> None:
    first = cache.stage("s", {"a": 1, "b": 2}, write_one, slot="p")
    again = cache.stage("s", {"a": 1, "b": 2}, pytest.fail, slot="p")
    other = cache.stage("s", {"a": 1, "b": 3}, write_one, slot="p")
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert first.why == "it had not run yet"
    assert other.why == "changed: b"
    assert again.folder == first.folder != other.folder


@pytest.mark.parametrize(
    "error", [ValueError("no"), ModelError("no"), KeyboardInterrupt(), FileNotFoundError("no")]
)
def test_a_stage_that_fails_leaves_nothing_and_raises_what_it_raised(
    cache: Cache, error: BaseException
) -> None:
    def fails(folder: Path) -> None:
        write_one(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        cache.stage("s", {}, fails, slot="p")
    assert caught.value is error
    assert folder_size(cache.root) == 0
    assert cache.find("s", {}) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("wrapped", ["bare", "cause", "text"])
def test_a_full_disk_is_told_however_a_library_wraps_it(cache: Cache, number: int, wrapped: str) -> None:
    def fails(folder: Path) -> None:
        write_one(folder)
        full = OSError(number, os.strerror(number))
        if wrapped == "bare":
            raise full
        if wrapped == "text":
            raise ValueError(f"I/O error: {os.strerror(number)} (os error {number})")
        raise ModelError("cannot export") from full

    with pytest.raises(MissingRequirementError, match=os.strerror(number)):
        cache.stage("s", {}, fails, slot="p")
    assert folder_size(cache.root) == 0


@FUZZ
@given(data=st.binary(max_size=300), name=st.sampled_from([RECORD, "result"]))
def test_a_damaged_entry_is_made_again(cache: Cache, data: bytes, name: str) -> None:
    entry = cache.stage("s", {}, write_one, slot="p")
    whole = (entry.folder / name).read_bytes()
    (entry.folder / name).write_bytes(data)
    again = cache.stage("s", {}, write_one, slot="p")
    assert (again.folder / "result").read_bytes() == b"one" or (name == "result" and len(data) == len(b"one"))
    (entry.folder / name).write_bytes(whole)


def test_damage_of_equal_length_is_found_by_verify(cache: Cache) -> None:
    entry = cache.stage("s", {}, write_one, slot="p")
    assert inventory.damaged(cache) == []
    (entry.folder / "result").write_bytes(b"two")
    assert [Path(found.folder) for found in inventory.damaged(cache)] == [entry.folder]


def test_a_damaged_slot_only_costs_the_explanation(cache: Cache) -> None:
    cache.stage("s", {"a": 1}, write_one, slot="p")
    for file in (cache.root / "slots").iterdir():
        file.write_bytes(b"\xff\x00../..")
    assert cache.stage("s", {"a": 2}, write_one, slot="p").why == "its last result is no longer in the cache"


def test_entries_unused_for_long_are_pruned_and_used_ones_stay(cache: Cache) -> None:
    old = cache.stage("s", {"a": 1}, write_one, slot="p").folder
    new = cache.stage("s", {"a": 2}, write_one, slot="p").folder
    for folder in (old, new):
        os.utime(folder / RECORD, (0, time.time() - 10 * 86400))
    assert cache.find("s", {"a": 2}) == new  # use counts
    assert inventory.remove_unused(cache, 5).size_bytes > 0
    assert not old.exists()
    assert new.exists()
    inventory.remove_all(cache)
    assert folder_size(cache.root) == 0


def test_what_a_dead_process_left_is_swept(cache: Cache) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = cache.root / "tmp" / f"{dead.pid}-left"
    own = cache.root / "tmp" / f"{os.getpid()}-own"
    for folder in (left, own):
        folder.mkdir(parents=True)
    with cache.scratch():
        assert not left.exists()
        assert own.exists()


def test_two_that_want_the_same_entry_make_it_once_and_the_second_is_told_that_it_waits(cache: Cache) -> None:
    entries: list[Entry] = []
    started, waits = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        started.set()
        assert waits.wait(30)
        write_one(folder)

    first = threading.Thread(target=lambda: entries.append(cache.stage("s", {}, slowly, slot="p")))
    first.start()
    assert started.wait(30)
    second = cache.stage("s", {}, pytest.fail, slot="q", on_wait=waits.set)
    first.join()
    assert (entries[0].cached, second.cached) == (False, True)
    assert second.why == "another build made it meanwhile"
    assert second.folder == entries[0].folder


def test_a_cache_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingRequirementError, match="EDGE_DEPLOY_CACHE"):
        Cache(tmp_path / "file").stage("s", {}, write_one, slot="p")


def test_a_slot_of_a_path_that_is_no_unicode_works(cache: Cache) -> None:
    slot = os.fsdecode(b"/home/\xff")
    assert cache.stage("s", {}, write_one, slot=slot).why == "it had not run yet"
    assert cache.stage("s", {}, pytest.fail, slot=slot).cached
