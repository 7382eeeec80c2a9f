"""deploy.toml as a value: whatever is written there gives a Project or one UsageError."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.project import Project, load
from targets.errors import UsageError

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOML = (Path(__file__).parents[2] / "examples" / "digits" / "deploy.toml").read_bytes()
LINES = TOML.decode().splitlines()

VALUES = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["true", "1979-05-27", '"8 ms"', '""', '"\\u0000"', "[]", "{}", "[[1]]", "{ a = { b = 1 } }"]
    ),
    st.integers(100, 9999).map(lambda digits: "9" * digits),
)


def read(folder: Path, content: bytes) -> Project:
    (folder / "deploy.toml").write_bytes(content)
    return load(folder)


def accepts(folder: Path, content: bytes) -> bool:
    """Whether the content is a project; anything but a UsageError fails the test."""
    message = ""
    try:
        read(folder, content)
    except UsageError as error:
        message = error.message
    assert len(message) < 2000
    return not message


@FUZZ
@given(place=st.integers(0, len(TOML) - 1), other=st.integers(0, len(TOML) - 1), byte=st.integers(0, 255))
def test_mutated_toml_is_a_project_or_a_usage_error(
    tmp_path: Path, place: int, other: int, byte: int
) -> None:
    accepts(tmp_path, TOML[:place] + bytes([byte]) + TOML[place + 1 :])
    accepts(tmp_path, TOML[: min(place, other)] + TOML[max(place, other) :])
    accepts(tmp_path, TOML[: max(place, other)] + TOML[min(place, other) :])


@FUZZ
@given(line=st.sampled_from([i for i, text in enumerate(LINES) if " = " in text]), value=VALUES)
def test_any_value_of_any_key_is_a_project_or_a_usage_error(tmp_path: Path, line: int, value: str) -> None:
    key = LINES[line].partition(" = ")[0]
    accepts(tmp_path, "\n".join([*LINES[:line], f"{key} = {value}", *LINES[line + 1 :]]).encode())


@pytest.mark.parametrize(
    "content", [b"a." * 20000 + b"a = 1", b"a = " + b"[" * 5000, b"a = " + b"{a=" * 5000]
)
def test_endless_nesting_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    assert not accepts(tmp_path, content)
    assert not accepts(tmp_path, TOML + b"\n[target.galaxy-s22]\n" + content)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*deploy init"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\\\\b", "x" * 300])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name for a folder"):
        read(tmp_path, TOML.replace(b'name = "digits"', f'name = "{name}"'.encode()))


def test_a_target_by_its_alias_is_refused_since_nothing_would_read_it(tmp_path: Path) -> None:
    own = b"\n[target.sm8450.prune]\nsparsity = 0.5\n"
    assert accepts(tmp_path, TOML + own)
    with pytest.raises(UsageError, match=r"Write \[target\.galaxy-s22\]"):
        read(tmp_path, TOML + own.replace(b"sm8450", b"'Samsung Galaxy S22'"))


def test_a_parity_limit_for_no_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'int9'.*int8"):
        read(tmp_path, TOML + b"\n[parity]\nmin_snr_db = { int9 = 20 }\n")


def test_a_value_too_long_for_a_message_is_cut(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, TOML.replace(b"[evaluate]", b'[evaluate]\ndirection = "' + b"x" * 9999 + b'"'))
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(("key", "value"), [("epochs", 1), ("learning_rate", 0.1)])
def test_flags_are_checked_like_the_file(tmp_path: Path, key: str, value: Any) -> None:
    project = read(tmp_path, TOML)
    assert getattr(project.override({"recover": {key: value}}).tables.recover, key) == value
    with pytest.raises(UsageError, match=key):
        project.override({"recover": {key: -1}})
