"""Weights from foreign files: honest ones load, nothing else raises anything but a DeployError."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from deploy.weights import assign, check_finite, find_state, load_checkpoint, load_weights
from targets.errors import DeployError, ModelError, UsageError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def torch_bytes(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


SAFETENSORS = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)})
CHECKPOINT = torch_bytes({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)})


def edits(data: bytes) -> st.SearchStrategy[bytes]:
    """A file with a few bytes changed, a part cut out or repeated, or its end cut off."""
    places = st.integers(0, len(data) - 1)
    changed = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(
        lambda changes: bytes(dict(changes).get(i, byte) for i, byte in enumerate(data))
    )
    cut = st.tuples(places, places).map(lambda pair: data[: min(pair)] + data[max(pair) :])
    again = st.tuples(places, places).map(lambda pair: data[: max(pair)] + data[min(pair) :])
    return st.one_of(changed, cut, again, places.map(lambda end: data[:end]))


def outcome(file: Path) -> int:
    """0 when the weights load, else the exit code; anything but a DeployError passes through."""
    try:
        load_weights(file)
    except DeployError as error:
        return error.exit_code
    return 0


class TiedEmbedding(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class ExtraState(nn.Linear):
    """A state dict with an entry that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("nobody gave any")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_a_checkpoint_of_everything_that_training_keeps_loads(tmp_path: Path, suffix: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    extra = {
        "step": 3,
        "lr": [0.1],
        "tags": {"a"},
        "raw": b"abc",
        "size": torch.Size([2]),
        "kind": torch.float16,
    }
    file = tmp_path / f"last{suffix}"
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), **extra}, file)
    loaded = load_checkpoint(file)
    assert {name: loaded[name] for name in extra} == extra
    for name, value in module.state_dict().items():
        assert torch.equal(load_weights(file)[name], value)


def test_views_and_rare_dtypes_load(tmp_path: Path) -> None:
    state = {
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "slice": torch.arange(12.0)[3:9:2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": nn.Parameter(torch.ones(3)),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(1.5),
    }
    torch.save(state, tmp_path / "w.pt")
    loaded = load_weights(tmp_path / "w.pt")
    for name, value in state.items():
        assert loaded[name].dtype is value.dtype
        assert loaded[name].tolist() == value.tolist()


@FUZZ
@given(data=edits(SAFETENSORS))
def test_mutated_safetensors_load_or_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    assert outcome(tmp_path / "w.safetensors") in (0, 4)


@FUZZ
@given(
    entry=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "BOOL", "", 3]),
            "shape": st.one_of(st.none(), st.lists(st.integers(-1, 2**64), max_size=3)),
            "data_offsets": st.one_of(st.none(), st.lists(st.integers(-1, 2**64), max_size=3)),
        },
    )
)
def test_any_safetensors_header_loads_or_is_refused(entry: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert outcome(tmp_path / "w.safetensors") in (0, 4)


@FUZZ
@given(data=edits(CHECKPOINT))
def test_mutated_checkpoints_load_or_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(data)
    assert outcome(tmp_path / "w.pt") in (0, 4)


def repacked(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(
                member.filename, pickled if member.filename.endswith("data.pkl") else old.read(member)
            )
    return stream.getvalue()


with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as _archive:
    PICKLE = _archive.read(next(name for name in _archive.namelist() if name.endswith("data.pkl")))


@FUZZ
@given(pickled=edits(PICKLE))
def test_mutated_pickles_load_or_are_refused(pickled: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(repacked(pickled))
    assert outcome(tmp_path / "w.pt") in (0, 4)


BOMBS = {
    "a bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "a tensor class": b"\x80\x02ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "a storage class": b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "a new object": b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85\x81.",
    "a counted bytearray": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a long string": b"\x80\x02X\xff\xff\xff\xff.",
    "a memo far out": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a key without end": b"\x80\x02}" + b")" + b"2\x86" * 200 + b"K\x01s.",
    "a set without end": b"\x80\x02cbuiltins\nset\n](" + b")" + b"2\x86" * 200 + b"e\x85R.",
    "a call of the shell": pickle.dumps(print, 2),
}


@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_at_once(pickled: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(repacked(pickled))
    with pytest.raises(ModelError, match=r"w\.pt"):
        load_weights(tmp_path / "w.pt")


def test_a_view_of_terabytes_over_a_few_bytes_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="claims more than it holds"):
        load_weights(tmp_path / "w.pt")


def test_members_that_claim_more_than_the_file_are_refused(tmp_path: Path) -> None:
    data = bytearray(CHECKPOINT)
    start = data.rindex(b"PK\x01\x02")  # the last entry of the central directory
    data[start + 20 : start + 28] = (0xFFFFFFF0).to_bytes(4, "little") * 2
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(ModelError):
        load_weights(tmp_path / "w.pt")


def test_a_tied_weight_may_be_stored_once() -> None:
    module, weight = TiedEmbedding(), torch.randn(5, 3)
    assign(module, {"embedding.weight": weight}, origin="w")
    assert torch.equal(module.head.weight, weight)
    assert module.head.weight is module.embedding.weight


def test_extra_state_that_the_file_lacks_stays_the_modules_own() -> None:
    module, weight = ExtraState(3, 2, bias=False), torch.randn(2, 3)
    assign(module, {"weight": weight}, origin="w")
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("bias"), "missing: bias"),
        (lambda state: state.update(other=torch.ones(1)), "not in the model: other"),
        (lambda state: state.update(bias=torch.ones(3)), r"bias \(3,\) for \(2,\)"),
        (lambda state: state.update(bias=torch.ones(2, dtype=torch.int8)), "bias int8 for float32"),
        (lambda state: state.update(bias=torch.ones(2, dtype=torch.complex64)), "bias complex64 for float32"),
        (lambda state: state["bias"].fill_(float("inf")), "infinity; found in bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, object]], object], told: str) -> None:
    state = {name: value.clone() for name, value in nn.Linear(3, 2).state_dict().items()}
    change(state)
    with pytest.raises(ModelError, match=told):
        assign(nn.Linear(3, 2), state, origin="w")


def test_half_precision_weights_fit_a_float_module() -> None:
    module = nn.Linear(3, 2)
    assign(module, {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).half()}, origin="w")
    assert module.weight.dtype is torch.float32


def test_a_lazy_module_is_told() -> None:
    with pytest.raises(ModelError, match="lazy"):
        assign(nn.LazyLinear(3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, origin="w")


def test_a_module_on_the_meta_device_is_told() -> None:
    with pytest.raises(ModelError, match="meta device"):
        check_finite(nn.Linear(2, 2, device="meta"), origin="m.py:build")


def test_missing_weights_and_unknown_suffixes_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing"):
        load_weights(tmp_path / "none.pt")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(UsageError, match=r"\.onnx"):
        load_weights(tmp_path / "w.onnx")


def test_a_state_dict_is_found_under_the_usual_keys() -> None:
    state = {"a": torch.ones(1)}
    for key in ("model", "state_dict", "model_state_dict"):
        assert find_state({key: state, "step": 1}) == state
    assert find_state({"step": 1}) is None
    assert find_state({}) is None
