"""Open Inference Protocol v2: what fits becomes arrays, what does not is told by its field."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.spec import TensorSpec
from deploy.serving.protocol import DATATYPES, Parsed, RequestError, parse, respond

IMAGE = TensorSpec(name="image", shape=("batch", 2, 3), bounds={"batch": (1, 4)})
IDS = TensorSpec(name="ids", shape=("batch", 5), dtype="int64", bounds={"batch": (1, 4)})
OUTPUTS = ("logits", "best")
FUZZ = settings(max_examples=400, deadline=None)


def image(**changes: Any) -> dict[str, Any]:
    data = [float(value) for value in range(6)]
    return {"name": "image", "shape": [1, 2, 3], "datatype": "FP32", "data": data, **changes}


def body(*inputs: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **rest}).encode()


def parsed(*inputs: dict[str, Any], specs: tuple[TensorSpec, ...] = (IMAGE,), **rest: Any) -> Parsed:
    return parse(body(*inputs, **rest), None, specs, OUTPUTS)


@pytest.mark.parametrize(
    "data", [[0, 1, 2, 3, 4, 5], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [[[0, 1.0, 2], [3, 4, 5]]]]
)
def test_flat_and_nested_data_mean_the_same(data: Any) -> None:
    array = parsed(image(data=data)).arrays["image"]
    assert array.dtype == np.float32
    assert array.tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize("binary", [False, True])
def test_every_datatype_goes_in_and_out_unchanged(dtype: str, binary: bool) -> None:
    values = np.array([0, 1, 1, 0, 1], dtype)
    spec = TensorSpec(name="x", shape=(5,), dtype=dtype)
    tensor: dict[str, Any] = {"name": "x", "shape": [5], "datatype": DATATYPES[dtype]}
    blob, header = b"", None
    if binary:
        blob = values.tobytes()
        tensor["parameters"] = {"binary_data_size": len(blob)}
    else:
        tensor["data"] = values.tolist()
    text = body(tensor, parameters={"binary_data_output": binary})
    header = str(len(text)) if binary else None
    request = parse(text + blob, header, [spec], ["y"])
    assert request.arrays["x"].dtype == values.dtype
    assert np.array_equal(request.arrays["x"], values)
    content, length = respond({"y": request.arrays["x"]}, request, model="m", version="1")
    answer = json.loads(content[:length])
    assert answer["outputs"][0]["datatype"] == DATATYPES[dtype]
    if binary:
        assert content[length:] == values.tobytes()
    else:
        assert answer["outputs"][0]["data"] == values.tolist()


def test_outputs_come_as_they_were_asked_for() -> None:
    assert parsed(image()).outputs == (("logits", False), ("best", False))
    wanted = [{"name": "best", "parameters": {"binary_data": True}}]
    assert parsed(image(), outputs=wanted, id="a7").outputs == (("best", True),)
    assert parsed(image(), id="a7").id == "a7"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "picture"}, "inputs"),
        ({"shape": [1, 2]}, "inputs[0].shape"),
        ({"shape": [2**40, 2, 3]}, "inputs[0].shape"),
        ({"shape": [-1, 2, 3]}, "inputs[0].shape"),
        ({"shape": [0, 2, 3]}, "inputs[0].shape"),
        ({"shape": [5, 2, 3]}, "inputs[0].shape"),
        ({"shape": [10**30, 2, 3]}, "inputs[0].shape"),
        ({"shape": [1.5, 2, 3]}, "inputs[0].shape[0]"),
        ({"shape": "1,2,3"}, "inputs[0].shape"),
        ({"datatype": "BYTES"}, "inputs[0].datatype"),
        ({"datatype": "FP64"}, "inputs[0].datatype"),
        ({"data": [0.0]}, "inputs[0].data"),
        ({"data": "AAAA"}, "inputs[0].data"),
        ({"data": None}, "inputs[0].data"),
        ({"data": {}}, "inputs[0].data"),
        ({"data": [1, 2, 3, 4, 5, "6"]}, "inputs[0].data"),
        ({"data": [1, 2, 3, 4, 5, True]}, "inputs[0].data"),
        ({"data": [1, 2, 3, 4, 5, 1e300]}, "inputs[0].data"),
        ({"data": [[0, 1, 2, 3, 4, 5]]}, "inputs[0].data"),
        ({"data": [[[0, 1, 2], [3, 4]]]}, "inputs[0].data"),
        ({"parameters": {"binary_data_size": 24}}, "inputs[0].data"),
        ({"parameters": {"binary_data_size": "24"}}, "inputs[0].parameters.binary_data_size"),
    ],
)
def test_what_does_not_fit_is_told_by_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as told:
        parsed(image(**changes))
    assert told.value.status == 400
    assert told.value.field == field
    assert json.loads(told.value.body())["field"] == field


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"[" * 100_000, b'{"inputs": ' + b"[" * 100_000, b"\xff\xfe{}",
        b'{"inputs": [{"name": "image", "shape": [1, 2, 3], "datatype": "FP32", "data": [NaN]}]}',
        b'{"inputs": [{"name": "image", "shape": [1, 2, 3], "datatype": "FP32", "data": [1e999]}]}',
        b'{"inputs": [{"name": "image", "shape": [1, 2, 3], "datatype": "FP32", "data": '
        + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as told:
        parse(raw, None, [IMAGE], OUTPUTS)
    assert told.value.status == 400


@pytest.mark.parametrize("values", [[np.nan] * 6, [np.inf] * 6, [-np.inf, 0, 0, 0, 0, 0]])
def test_numbers_that_are_none_are_refused_in_binary_too(values: list[float]) -> None:
    blob = np.array(values, np.float32).tobytes()
    text = body(image(data=[], parameters={"binary_data_size": 24}))
    text = text.replace(b'"data": [], ', b"")
    with pytest.raises(RequestError, match="NaN"):
        parse(text + blob, str(len(text)), [IMAGE], OUTPUTS)


@pytest.mark.parametrize("header", ["-1", "1e3", "9" * 30, "5000", "²", ""])
def test_a_header_length_that_lies_is_told(header: str) -> None:
    with pytest.raises(RequestError) as told:
        parse(body(image()), header, [IMAGE], OUTPUTS)
    assert told.value.field == "Inference-Header-Content-Length"


@pytest.mark.parametrize("claimed", [0, 23, 25, 2**31])
def test_binary_sizes_that_lie_are_told(claimed: int) -> None:
    tensor = image(parameters={"binary_data_size": claimed})
    del tensor["data"]
    text = body(tensor)
    with pytest.raises(RequestError, match="binary"):
        parse(text + bytes(24), str(len(text)), [IMAGE], OUTPUTS)


def test_bytes_that_nobody_claims_are_told() -> None:
    text = body(image())
    with pytest.raises(RequestError, match="the inputs claim 0"):
        parse(text + b"x", str(len(text)), [IMAGE], OUTPUTS)


def test_a_dimension_that_two_inputs_share_has_one_size() -> None:
    ids = {"name": "ids", "shape": [2, 5], "datatype": "INT64", "data": list(range(10))}
    with pytest.raises(RequestError, match="batch is 2 in ids and 1 in another"):
        parsed(image(), ids, specs=(IMAGE, IDS))


def test_integers_beyond_their_datatype_are_told() -> None:
    spec = TensorSpec(name="x", shape=(1,), dtype="uint8")
    for value in (-1, 256, 2**70):
        with pytest.raises(RequestError):
            parsed({"name": "x", "shape": [1], "datatype": "UINT8", "data": [value]}, specs=(spec,))


@FUZZ
@given(st.binary(max_size=200), st.none() | st.text(max_size=8))
def test_any_bytes_are_answered_or_refused(raw: bytes, header: str | None) -> None:
    with pytest.raises(RequestError):
        parse(raw, header, [IMAGE], OUTPUTS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON)
def test_any_value_in_a_field_is_answered_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(RequestError):
        assert parsed(image(**{key: value})).arrays["image"].shape == (1, 2, 3)
