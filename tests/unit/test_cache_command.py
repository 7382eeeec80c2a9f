"""`deploy cache`: what it counts, finds damaged, and removes."""

import json
import os
import time
from pathlib import Path

import pytest

from deploy import inventory
from deploy.cache import RECORD, Cache
from deploy.cli.main import run

DAY_S = 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache with two entries of 1000 and 2000 bytes."""
    root = tmp_path / "a cache"
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(root))
    cache = Cache(root)
    for number in (1, 2):
        add(cache, f"stage {number}", bytes(number * 1000))
    return cache


def add(cache: Cache, name: str, content: bytes) -> Path:
    def make(folder: Path) -> None:
        (folder / "model.bin").write_bytes(content)

    return cache.stage(name, {"bytes": len(content)}, make, slot=name).folder


def folder_of(cache: Cache, stage: str) -> Path:
    return next(Path(entry.folder) for entry in inventory.stored(cache) if entry.stage == stage)


def age(folder: Path, days: float) -> None:
    moment = time.time() - days * DAY_S
    os.utime(folder / RECORD, (moment, moment))


def test_size_counts_every_byte_below_the_folder(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "size", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    on_disk = sum(file.stat().st_size for file in cache.root.rglob("*") if file.is_file())
    assert size == {"root": str(cache.root), "size_bytes": on_disk, "entries": 2}
    assert run(["cache", "size"]) == 0
    assert capsys.readouterr().out.strip().endswith("in 2 entries")


def test_an_absent_cache_is_empty_and_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_DEPLOY_CACHE", str(tmp_path / "none"))
    for words in (["size"], ["list"], ["verify"], ["prune", "--all"], ["prune", "--older-than", "1"]):
        assert run(["cache", *words]) == 0
    assert "0 entries" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_list_names_the_longest_unused_first(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    age(folder_of(cache, "stage 2"), days=3)
    assert run(["cache", "list", "--json"]) == 0
    assert [entry["stage"] for entry in json.loads(capsys.readouterr().out)] == ["stage 2", "stage 1"]
    assert run(["cache", "list"]) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith("stage 2")
    assert "3 d" in first


def test_looking_is_no_use(cache: Cache) -> None:
    folder = folder_of(cache, "stage 1")
    age(folder, days=9)
    for words in (["size"], ["list"], ["verify"]):
        run(["cache", *words])
    assert time.time() - (folder / RECORD).stat().st_mtime > 8 * DAY_S


def test_a_whole_cache_is_verified(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "verify"]) == 0
    assert capsys.readouterr().out == "every entry is what its record says\n"


def changed(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"\1" + bytes(999))


def truncated(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"")


def missing(folder: Path) -> None:
    (folder / "model.bin").unlink()


def without_record(folder: Path) -> None:
    (folder / RECORD).unlink()


def record_is_garbage(folder: Path) -> None:
    (folder / RECORD).write_bytes(b"\xff{")


def with_a_stranger(folder: Path) -> None:
    (folder / "other.bin").touch()


DAMAGES = (changed, truncated, missing, without_record, record_is_garbage, with_a_stranger)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_names_the_damaged_entry_and_exits_8(
    cache: Cache, damage: "type", capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = folder_of(cache, "stage 1"), folder_of(cache, "stage 2")
    damage(bad)
    assert run(["cache", "verify"]) == 8
    message = capsys.readouterr().err
    assert bad.name in message
    assert good.name not in message
    assert "deploy cache verify --repair" in message
    assert bad.is_dir()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_repair_removes_the_damaged_entry_alone(cache: Cache, damage: "type") -> None:
    bad, good = folder_of(cache, "stage 1"), folder_of(cache, "stage 2")
    damage(bad)
    assert run(["cache", "verify", "--repair"]) == 0
    assert not bad.exists()
    assert (good / "model.bin").is_file()
    assert run(["cache", "verify"]) == 0


def test_a_repaired_entry_is_made_again(cache: Cache) -> None:
    changed(folder_of(cache, "stage 1"))
    run(["cache", "verify", "--repair"])
    assert (add(cache, "stage 1", bytes(1000)) / "model.bin").read_bytes() == bytes(1000)


def test_damage_as_json_is_one_error(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    changed(folder_of(cache, "stage 1"))
    assert run(["cache", "verify", "--json"]) == 8
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["exit_code"]) == ("integrity", 8)


def test_pruning_by_age_leaves_what_was_used_since(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    old, young = folder_of(cache, "stage 1"), folder_of(cache, "stage 2")
    age(old, days=10)
    age(young, days=5)
    assert run(["cache", "prune", "--older-than", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 1
    assert not old.exists()
    assert young.is_dir()


def test_an_entry_that_a_build_used_is_young_again(cache: Cache) -> None:
    folder = folder_of(cache, "stage 1")
    age(folder, days=10)
    add(cache, "stage 1", bytes(1000))
    run(["cache", "prune", "--older-than", "7"])
    assert folder.is_dir()


def test_prune_all_leaves_no_file(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    for leftover in ("resume/half.ckpt", "tmp/1-x/entry/file", "sources/abc"):
        (cache.root / leftover).parent.mkdir(parents=True, exist_ok=True)
        (cache.root / leftover).write_bytes(b"x")
    size = inventory.size(cache).size_bytes
    assert run(["cache", "prune", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"entries": 2, "size_bytes": size}
    assert [file for file in cache.root.rglob("*") if file.is_file()] == []


def test_prune_all_spares_what_is_not_the_caches(cache: Cache) -> None:
    (cache.root / "thesis.txt").write_text("of a person who pointed EDGE_DEPLOY_CACHE at the wrong folder")
    run(["cache", "prune", "--all"])
    assert (cache.root / "thesis.txt").is_file()


@pytest.mark.parametrize(
    "words",
    [[], ["--all", "--older-than", "3"], ["--older-than", "-1"], ["--older-than", "nan"]],
    ids=["nothing", "both", "negative", "nan"],
)
def test_prune_removes_nothing_unless_it_was_told_what(cache: Cache, words: list[str]) -> None:
    assert run(["cache", "prune", *words]) == 2
    assert len(inventory.stored(cache)) == 2
