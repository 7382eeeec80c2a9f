"""The folder of a pruned model: whole or absent, never another's, and refused when it is damaged."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from oddities import Plain, SharedWeights, TiedWeights, example, settled
from safetensors.torch import save_file
from torch import Tensor, nn

from deploy.cli.main import run
from deploy.pruning import folder as folders
from deploy.pruning import standalone
from deploy.pruning.delta import load_pruned
from deploy.pruning.folder import PrunedModel, load_folder, prune, read_folder
from targets.errors import IntegrityError, MissingRequirementError, UsageError

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def broken():
    raise ValueError("no such width")

def leaves():
    raise SystemExit(3)

def nothing():
    return 7
"""
INPUT = ["--input", "image:batch,3,12,12:float32"]


class TwoNames(nn.Module):
    """One inner layer that two attributes hold: its tensors have two names in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 32, 3, padding=1)
        self.again = self.inner
        self.leave = nn.Conv2d(32, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.again(torch.relu(self.stem(image))))
        return self.classifier(torch.relu(self.leave(x)).mean(dim=(2, 3)))


def pruned_plain(out: Path | None, **options: Any) -> PrunedModel:
    return prune(settled(Plain), example(Plain), sparsity=0.3, output_dir=out, **options)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [Plain, SharedWeights, TiedWeights])
def test_the_standalone_loader_agrees_with_load_pruned(kind: type[nn.Module], tmp_path: Path) -> None:
    result = prune(settled(kind), example(kind), sparsity=0.3, output_dir=tmp_path / "out")
    with torch.no_grad():
        for loaded in (standalone.load(kind, tmp_path / "out"), load_folder(kind, tmp_path / "out")):
            assert torch.equal(loaded.eval()(*example(kind)), result.module(*example(kind)))
    attributes = {path: part.extra_repr() for path, part in result.module.named_modules()}
    loaded = standalone.load(kind, tmp_path / "out")
    assert attributes == {path: part.extra_repr() for path, part in loaded.named_modules()}


def test_the_loader_in_the_folder_is_the_tested_source(tmp_path: Path) -> None:
    pruned_plain(tmp_path / "out")
    assert (tmp_path / "out" / "load.py").read_bytes() == Path(standalone.__file__).read_bytes()


def test_half_precision_comes_back_in_half_precision(tmp_path: Path) -> None:
    inputs = tuple(tensor.half() for tensor in example(Plain))
    prune(settled(Plain).half(), inputs, sparsity=0.3, output_dir=tmp_path / "out")
    assert standalone.load(Plain, tmp_path / "out").one[0].weight.dtype is torch.float16


def test_a_tied_weight_stays_tied(tmp_path: Path) -> None:
    prune(settled(TiedWeights), example(TiedWeights), sparsity=0.3, output_dir=tmp_path / "out")
    loaded = standalone.load(TiedWeights, tmp_path / "out")
    assert loaded.one.weight is loaded.two.weight


def test_the_loader_names_what_another_factory_lacks(tmp_path: Path) -> None:
    pruned_plain(tmp_path / "out")
    with pytest.raises(ValueError, match=r"(one|two|three)\S* of the factory's module is \[16, "):
        standalone.load(lambda: Plain(16), tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no (one|two|three)"):
        standalone.load(TwoNames, tmp_path / "out")


def test_the_loader_refuses_plain_weights_and_a_later_format(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no record of what was pruned"):
        standalone.load(Plain, tmp_path)
    metadata = {standalone.METADATA_KEY: '{"version": 2}'}
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="format 2, this loader reads 1"):
        standalone.load(Plain, tmp_path)


def test_every_name_of_a_shared_layer_is_sliced_in_the_checkpoint() -> None:
    module = settled(TwoNames)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = prune(module, example(Plain), sparsity=0.3, checkpoint={"model": state, "ema": dict(state)})
    assert result.module.inner.weight.shape[0] < 32
    assert result.checkpoint is not None
    for part in ("model", "ema"):
        assert result.checkpoint[part]["again.weight"].shape == result.module.inner.weight.shape
        result.module.load_state_dict(result.checkpoint[part], strict=True)


def test_optimizers_deeper_in_the_checkpoint_are_sliced_too() -> None:
    module = settled(Plain)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(*example(Plain)).square().mean().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": {f"module.{name}": tensor for name, tensor in module.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "average": {"decay": 0.9, "weights": module.state_dict()},
        "history": [{"loss": 1.0}],
    }
    result = prune(module, example(Plain), sparsity=0.3, checkpoint=checkpoint)
    assert result.checkpoint is not None
    shapes = [parameter.shape for parameter in result.module.parameters()]
    states = result.checkpoint["optimizer_states"][0]["state"]
    assert [states[number]["momentum_buffer"].shape for number in sorted(states)] == shapes
    result.module.load_state_dict(result.checkpoint["average"]["weights"], strict=True)
    assert result.checkpoint["history"] == [{"loss": 1.0}]
    assert list(result.checkpoint) == list(checkpoint)
    assert (
        checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].shape == module.stem[0].weight.shape
    )


def test_an_earlier_result_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned_plain(out)
    first = snapshot(out)
    with pytest.raises(UsageError, match="--force"):
        pruned_plain(out)
    assert snapshot(out) == first
    result = pruned_plain(out, seed=5, force=True)
    assert read_folder(out) == result.record
    assert result.record.seed == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_this_command_did_not_write_is_never_touched(force: bool, tmp_path: Path) -> None:
    other, mixed, file = tmp_path / "other", tmp_path / "mixed", tmp_path / "file"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    pruned_plain(mixed)
    (mixed / "resumed.pt").write_text("trained since")
    file.write_text("a file")
    before = snapshot(tmp_path)
    for out in (other, mixed, file, file / "below"):
        with pytest.raises(UsageError, match=r"did not write|is a file"):
            pruned_plain(out, force=force)
    assert snapshot(tmp_path) == before


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    pruned_plain(tmp_path / "link")
    assert read_folder(tmp_path / "real").model == "Plain"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("stage", ["save_pruned", "_prove", "_files", "_swap"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_while_writing_leaves_what_was_there(
    stage: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pruned_plain(out)
    before = snapshot(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(folders, stage, fail)
    expected = MissingRequirementError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        pruned_plain(out, force=True)
    with pytest.raises(expected):
        pruned_plain(tmp_path / "new" / "deep" / "er")
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_result_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pruned_plain(out)
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(MissingRequirementError, match="Permission denied"):
        pruned_plain(out, force=True)
    assert snapshot(tmp_path) == before


def test_a_loader_that_gives_another_module_stops_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "load", lambda factory, folder: settled(Plain, seed=9))
    with pytest.raises(AssertionError, match="does not give back"):
        pruned_plain(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(("size", "checkpoint"), [("40k", False), ("160k", True)])
def test_a_full_disk_is_told_as_one(size: str, checkpoint: bool, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    training = {"model": settled(Plain).state_dict(), "noise": torch.randn(40_000)}
    try:
        with pytest.raises(MissingRequirementError, match="No space left on device") as caught:
            pruned_plain(tmp_path / "out", checkpoint=training if checkpoint else None)
        assert caught.value.exit_code == 3
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned_plain(out)
    good = (out / "pruning.json").read_bytes()
    with pytest.raises(UsageError, match="no pruned model at"):
        read_folder(tmp_path)
    for text, message in ((b"{", "damaged"), (good.replace(b'"1.0"', b'"2.0"', 1), "unknown schema version")):
        (out / "pruning.json").write_bytes(text)
        with pytest.raises(IntegrityError, match=message):
            read_folder(out)
    (out / "pruning.json").write_bytes(good)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not what"):
        load_folder(Plain, out)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory and its weights, and no deploy.toml."""
    (tmp_path / "model.py").write_text(FACTORY)
    (tmp_path / "weights").mkdir()
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    torch.manual_seed(0)
    save_file(namespace["build"]().state_dict(), tmp_path / "weights" / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WHOLE = ["weights/w.safetensors", "-o", "out", "--model", "model.py:build", *INPUT]


def test_a_factory_and_inputs_on_the_command_line_are_enough(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prune", *WHOLE, "--sparsity", "0.3", "--multiple", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((work / "out" / "pruning.json").read_text())
    assert (record["model"], record["origin"]["example_inputs"]) == ("model", "synthetic data")
    assert all(each["after"] % 4 == 0 for each in record["layers"])
    assert [path.name for path in (work / "out").glob("*.pt")] == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([*WHOLE, "--sparsity", "0"], 2, "sparsity is out of range; found 0.0"),
        ([*WHOLE, "--sparsity", "1"], 2, "sparsity is out of range; found 1.0"),
        ([*WHOLE, "--sparsity", "1.5"], 2, "sparsity is out of range; found 1.5"),
        ([*WHOLE, "--sparsity", "nan"], 2, "sparsity"),
        ([*WHOLE, "--sparsity", "much"], 2, "much"),
        ([*WHOLE, "--of", "latency"], 2, "prune.of"),
        ([*WHOLE, "--ranking", "fair"], 2, "prune.ranking"),
        ([*WHOLE, "--method", "channel"], 2, "Did you mean 'channels'"),
        ([*WHOLE, "--criterion", "l3"], 2, "unknown criterion"),
        ([*WHOLE, "--criterion", "taylor"], 2, "needs labels"),
        ([*WHOLE, "--multiple", "0"], 2, "channel_multiple is out of range"),
        ([*WHOLE, "--multiple", "64"], 2, "no channel can be removed at channel_multiple 64"),
        ([*WHOLE, "--multiple", "16", "--sparsity", "0.9"], 2, "cannot be removed at channel_multiple 16"),
        ([*WHOLE, "--min-channels", "0"], 2, "min_channels"),
        ([*WHOLE, "--exclude", "nowhere.*"], 2, "matches no module"),
        ([*WHOLE, "--target", "galaxy-s2222"], 2, "galaxy-s22"),
        ([*WHOLE[:3], *INPUT], 2, "the factory of the dense model is unknown"),
        (WHOLE[:5], 2, "the inputs of the model are unknown"),
        ([*WHOLE[:5], "--input", "image"], 2, "--input does not fit"),
        ([*WHOLE[:5], "--input", "image:batch,3,12,12:float31"], 2, "dtype is unknown"),
        ([*WHOLE[:5], "--input", "image:batch,5,12,12"], 4, "forward pass fails"),
        (["nowhere.pt", *WHOLE[1:]], 2, "the checkpoint is no file; found nothing"),
        (["weights", *WHOLE[1:]], 2, "the checkpoint is no file; found the folder"),
        (["model.py", *WHOLE[1:]], 2, "is of no known kind"),
        ([*WHOLE, "-c", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
        ([*WHOLE[:3], "--model", "other.py:build", *INPUT], 2, "other.py is missing"),
        ([*WHOLE[:3], "--model", "model.py:built", *INPUT], 2, "has no 'built'"),
        ([*WHOLE[:3], "--model", "model", *INPUT], 2, "model.source does not fit"),
        ([*WHOLE[:3], "--model", "model.py:broken", *INPUT], 4, "no such width"),
        ([*WHOLE[:3], "--model", "model.py:leaves", *INPUT], 4, "called sys.exit"),
        ([*WHOLE[:3], "--model", "model.py:nothing", *INPUT], 4, "returns no module"),
        (["weights/w.safetensors", "-o", "model.py", *WHOLE[3:]], 2, "is a file"),
        (["weights/w.safetensors", "-o", "weights", *WHOLE[3:]], 2, "did not write"),
        ([*WHOLE[:1], *WHOLE[3:]], 2, "Missing option"),
    ],
)
def test_a_mistake_gives_one_message_the_documented_code_and_no_folder(
    words: list[str], code: int, message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(work)
    assert run(["prune", *words]) == code
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert snapshot(work) == before
    assert not (work / "out").exists()


class Runs:
    """A pickle of it creates a file when it is loaded carelessly."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("pwned",))


def bad_checkpoints() -> dict[str, Any]:
    torch.manual_seed(0)
    nan = {"0.weight": torch.full((16, 3, 3, 3), float("nan"))}
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    state = namespace["build"]().state_dict()
    return {
        "hostile": {"model": state, "run": Runs()},
        "weightless": {"epoch": 3, "loss": 1.0},
        "missing keys": {"model": OrderedDict(list(state.items())[1:])},
        "nan": {"model": {**state, **nan}},
        "other shapes": {"model": {**state, "0.weight": torch.zeros(8, 3, 3, 3)}},
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hostile", "mkdir, which is not run"),
        ("weightless", "holds no weights"),
        ("missing keys", "missing: 0.weight"),
        ("nan", "NaN"),
        ("other shapes", "0.weight (8, 3, 3, 3) for (16, 3, 3, 3)"),
    ],
)
def test_a_bad_checkpoint_is_refused_as_a_model_error(
    kind: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(bad_checkpoints()[kind], work / "bad.pt")
    assert run(["prune", "bad.pt", *WHOLE[1:]]) == 4
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (work / "out").exists()
    assert not (work / "pwned").exists()


def test_the_hostile_pickle_of_these_tests_would_run_code(work: Path) -> None:
    pickle.loads(pickle.dumps(Runs()))
    assert (work / "pwned").is_dir()


def test_a_result_is_not_pruned_again_from_its_own_weights(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prune", *WHOLE, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["prune", "out/model.safetensors", "-o", "again", *WHOLE[3:]]) == 2
    assert "is pruned already" in capsys.readouterr().err


def test_patterns_of_masks_are_not_this_commands(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = '[model]\nsource = "model.py:build"\n[inputs.image]\nshape = ["batch", 3, 12, 12]\n[prune]\n'
    (work / "deploy.toml").write_text(toml + 'pattern = "2:4"\n')
    assert run(["prune", "weights/w.safetensors", "-o", "out", "-c", "deploy.toml"]) == 2
    assert "makes no 2:4 masks" in capsys.readouterr().err
    (work / "deploy.toml").write_text(toml + "sparsity = 0.15\nexclude = ['2']\n")
    assert run(["prune", "weights/w.safetensors", "-o", "out", "-c", ".", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["asked"], record["exclude"]) == (0.15, ["2"])


def test_what_the_users_model_prints_stays_out_of_the_json(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "model.py").write_text(
        FACTORY.replace("def build():", "print('import')\ndef build():\n    print('hi')")
    )
    assert run(["prune", *WHOLE, "--json", "-v"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["model"] == "model"
    assert "hi" in told.err


def test_errors_are_json_with_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", *WHOLE, "--sparsity", "2", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_help_loads_no_torch() -> None:
    program = (
        "import sys; from deploy.cli.main import run; run(['prune', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sparsity" in done.stdout


def test_the_folder_equals_what_load_pruned_reads(tmp_path: Path) -> None:
    result = pruned_plain(tmp_path / "out")
    loaded = load_pruned(Plain, tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), result.module.parameters(), strict=True)
    )
