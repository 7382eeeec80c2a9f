"""The delta as a file: rebuilt without the pruning library, and refused when it does not fit."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oddities import Plain, Residual, example, settled
from safetensors.torch import save_file

from deploy.pruning.channels import ChannelPruning, prune_channels
from deploy.pruning.delta import (
    METADATA_KEY,
    ArchitectureDelta,
    apply_delta,
    load_pruned,
    read_delta,
    save_pruned,
)
from targets.errors import IntegrityError, ModelError


@pytest.fixture
def result() -> ChannelPruning:
    return prune_channels(settled(Plain), example(Plain), sparsity=0.3)


@pytest.fixture
def file(result: ChannelPruning, tmp_path: Path) -> Path:
    path = tmp_path / "ünïcode name.safetensors"
    save_pruned(result.module, result.delta, path)
    return path


def test_json_brings_back_an_equal_delta(result: ChannelPruning) -> None:
    assert ArchitectureDelta.from_json(result.delta.to_json()) == result.delta


def test_applied_to_the_dense_module_it_gives_the_pruned_one(result: ChannelPruning) -> None:
    module = settled(Plain)
    again = apply_delta(module, result.delta)
    assert torch.equal(again(*example(Plain)), result.module(*example(Plain)))
    assert module.one[0].weight.shape == (32, 32, 3, 3)


def test_the_file_is_one_and_carries_its_delta(result: ChannelPruning, file: Path) -> None:
    assert list(file.parent.iterdir()) == [file]
    assert read_delta(file) == result.delta


def test_half_precision_weights_come_back_as_they_were(tmp_path: Path) -> None:
    inputs = tuple(tensor.half() for tensor in example(Plain))
    result = prune_channels(settled(Plain).half(), inputs, sparsity=0.3)
    save_pruned(result.module, result.delta, tmp_path / "half.safetensors")
    loaded = load_pruned(Plain, tmp_path / "half.safetensors")
    assert loaded.one[0].weight.dtype == torch.float16
    assert torch.equal(loaded.one[0].weight, result.module.one[0].weight)


def test_loading_needs_no_pruning_library(file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from deploy.pruning.delta import read_delta; "
        "read_delta(Path(sys.argv[1])); assert 'torch_pruning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=True)


def test_the_package_loads_no_torch() -> None:
    program = "import sys, deploy.pruning; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_factory_is_refused_by_name(file: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit.*(one|two|three)"):
        load_pruned(Residual, file)
    with pytest.raises(ModelError, match=r"found (one|two|three).*\(16, "):
        load_pruned(lambda: Plain(16), file)


def test_missing_and_unknown_keys_are_named(result: ChannelPruning, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    tensors["invented"] = tensors.pop("classifier.bias")
    path = tmp_path / "keys.safetensors"
    save_file(tensors, path, metadata={METADATA_KEY: result.delta.to_json()})
    with pytest.raises(ModelError, match=r"missing: classifier\.bias; unknown: invented"):
        load_pruned(Plain, path)


def test_plain_weights_without_a_delta_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file(settled(Plain).state_dict(), path)
    with pytest.raises(ModelError, match="holds no architecture delta"):
        load_pruned(Plain, path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        read_delta(tmp_path / "nowhere.safetensors")


def test_a_truncated_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="damaged"):
        load_pruned(Plain, file)


@pytest.mark.parametrize("claimed", [2**40, 2**63, 10_000])
def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}" * 50)
    with pytest.raises(IntegrityError, match="header that cannot be right"):
        read_delta(path)


@pytest.mark.parametrize("text", ["{", "{}[]", '{"version": 1, "surprise": 2}', '{"version": 99}'])
def test_a_damaged_delta_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "damaged.safetensors"
    header = json.dumps({"__metadata__": {METADATA_KEY: text}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(IntegrityError, match="delta"):
        read_delta(path)
