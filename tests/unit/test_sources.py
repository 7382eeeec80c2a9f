"""Samples from foreign files: honest ones load, nothing else raises anything but a UsageError."""

import io
import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from calibration import sources
from calibration.spec import TensorSpec
from targets.errors import UsageError

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPEC = TensorSpec(name="x", shape=("batch", 3), bounds={"batch": (1, 8)})
TOKENS = TensorSpec(name="x", shape=("batch", 3), dtype="uint8", bounds={"batch": (1, 8)})
X = np.arange(12, dtype=np.float32).reshape(4, 3)
LABEL = np.arange(4)


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


NPZ, PACKED = npz(x=X, label=LABEL), npz(compressed=True, x=X, label=LABEL)
SAFETENSORS = save({"x": X, "label": LABEL})


def edits(data: bytes) -> st.SearchStrategy[bytes]:
    """A file with a few bytes changed, a part cut out or repeated, or its end cut off."""
    places = st.integers(0, len(data) - 1)
    changed = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(
        lambda changes: bytes(dict(changes).get(i, byte) for i, byte in enumerate(data))
    )
    cut = st.tuples(places, places).map(lambda pair: data[: min(pair)] + data[max(pair) :])
    again = st.tuples(places, places).map(lambda pair: data[: max(pair)] + data[min(pair) :])
    return st.one_of(changed, cut, again)


def loads(folder: Path, name: str, data: bytes) -> bool:
    """Whether a file loads; anything but a UsageError fails the test."""
    (folder / name).write_bytes(data)
    try:
        dataset = sources.load(name, folder, (SPEC,))
    except UsageError:
        return False
    assert dataset.batch(0, 1)["x"].shape == (1, 3)
    return True


@pytest.mark.parametrize(
    ("name", "data"), [("d.npz", NPZ), ("p.npz", PACKED), ("d.safetensors", SAFETENSORS)]
)
def test_arrays_by_name_load_with_their_labels(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    dataset = sources.load(name, tmp_path, (SPEC,))
    np.testing.assert_array_equal(dataset.inputs["x"], X)
    np.testing.assert_array_equal(dataset.labels, LABEL)


@FUZZ
@given(data=edits(NPZ), packed=edits(PACKED))
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")  # numpy's, of headers that Python 2 wrote
def test_mutated_npz_loads_or_is_refused(tmp_path: Path, data: bytes, packed: bytes) -> None:
    loads(tmp_path, "d.npz", data)
    loads(tmp_path, "p.npz", packed)


@FUZZ
@given(data=edits(SAFETENSORS))
def test_mutated_safetensors_load_or_are_refused(tmp_path: Path, data: bytes) -> None:
    loads(tmp_path, "d.safetensors", data)


@FUZZ
@given(
    entry=st.one_of(
        st.none(),
        st.integers(),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "I64", "BF16", "BOOL", 3]),
                "shape": st.one_of(st.none(), st.lists(st.integers(-1, 2**64), max_size=3)),
                "data_offsets": st.one_of(st.none(), st.lists(st.integers(-1, 2**64), max_size=3)),
            },
        ),
    )
)
def test_any_safetensors_header_loads_or_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    loads(tmp_path, "d.safetensors", len(header).to_bytes(8, "little") + header + bytes(16))


def test_an_npz_of_a_kilobyte_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)}
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64))
    (tmp_path / "d.npz").write_bytes(stream.getvalue())
    with pytest.raises(UsageError, match="does not hold what it claims"):
        sources.load("d.npz", tmp_path, (SPEC,))


def test_an_npz_whose_directory_claims_gigabytes_too_is_refused(tmp_path: Path) -> None:
    data = bytearray(NPZ)
    start = data.rindex(b"PK\x01\x02")
    data[start + 20 : start + 28] = (0xF0000000).to_bytes(4, "little") * 2
    assert not loads(tmp_path, "d.npz", bytes(data))


def test_an_npz_that_expands_beyond_reason_is_refused(tmp_path: Path) -> None:
    stream, array = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros((1 << 22, 3), np.float32))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", array.getvalue())
    (tmp_path / "d.npz").write_bytes(stream.getvalue())
    with pytest.raises(UsageError, match="too large"):
        sources.load("d.npz", tmp_path, (SPEC,))


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.full((4, 3), 300, np.int64), "values from 300 to 300.*0 to 255"),
        (np.full((4, 3), -1, np.int8), "values from -1 to -1"),
        (np.ones((4, 3), np.float32), "wrong dtype"),
    ],
)
def test_integers_that_would_wrap_are_refused(array: np.ndarray, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        sources.from_arrays({"x": array}, (TOKENS,), origin="data")


def test_integers_that_fit_may_come_in_a_wider_dtype() -> None:
    data = sources.from_arrays({"x": np.full((4, 3), 255, np.int64)}, (TOKENS,), origin="data")
    assert data.batch(0, 1)["x"].tolist() == [[255, 255, 255]]


def test_an_endless_function_gives_the_samples_that_were_asked_for(tmp_path: Path) -> None:
    def endless(_: str) -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count():
            yield {"x": np.full((2, 3), step, np.float32)}

    data = sources.load("d.py:f", tmp_path, (SPEC,), samples=5, user_function=endless)
    assert len(data) == 5
    assert data.inputs["x"].max() <= 2


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([], "no batches"),
        ([3], "int"),
        ([{}], r"\[\]"),
        ([{"x": X}, {"y": X}], "mappings of x"),
        ([{"x": X}, {"x": X[:, :2]}], "do not fit together"),
        ([{"x": [[1, 2], [3]]}], "no array"),
        ([{"x": np.float32(1)}], "do not fit together"),
    ],
)
def test_a_function_of_anything_but_batches_is_told(tmp_path: Path, batches: list[Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        sources.load("d.py:f", tmp_path, (SPEC,), user_function=lambda _: batches)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, part in (("b.npz", X[2:]), ("a.npz", X[:2])):
        (tmp_path / "d" / name).write_bytes(npz(x=part))
    np.testing.assert_array_equal(sources.load("d", tmp_path, (SPEC,)).inputs["x"], X)
    (tmp_path / "d" / "c.npz").write_bytes(npz(x=X, y=X))
    with pytest.raises(UsageError, match="different arrays"):
        sources.load("d", tmp_path, (SPEC,))


def test_synthetic_data_of_terabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Lower samples"):
        sources.load("synthetic", tmp_path, (SPEC,), samples=10**12)
