"""The search for the first wrong stage and module, on a model small enough to break by hand."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.dataset import synthetic
from calibration.spec import TensorSpec
from deploy.validation.bisect import Case, UnclearError, bisect, explain
from exporters.base import Quantization
from exporters.capture import capture
from exporters.executorch import ExecuTorchExporter, lower
from exporters.quiet import quiet

SPEC = TensorSpec(name="image", shape=("batch", 2, 8, 8), bounds={"batch": (1, 4)})
FIXED = TensorSpec(name="image", shape=(4, 2, 8, 8))


class SharedPair(nn.Module):
    """A stem with batch-norm, a convolution that may be called twice, and a classifier."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.shared = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        inner = torch.relu(self.shared(x)) if self.twice else x
        x = torch.relu(x + self.shared(inner))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    made = SharedPair()
    made.stem[1].running_mean.normal_()
    made.stem[1].running_var.uniform_(0.5, 2)
    return made.eval()


@pytest.fixture(scope="module")
def case_of(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A right rung in a precision, as a case; made once each."""
    made: dict[str, Case] = {}
    least = {"float32": 80.0, "float16": 45.0, "int8": 15.0}
    calibration = list(synthetic([FIXED], samples=16, seed=1).batches(4))

    def case(precision: str) -> Case:
        integers = precision == "int8"
        spec = FIXED if integers else SPEC
        if precision not in made:
            file = tmp_path_factory.mktemp("rung") / "model.pte"
            with quiet():
                captured = capture(module, [spec])
                ExecuTorchExporter().export(
                    captured,
                    precision=precision,
                    calibration=calibration,
                    quantization=Quantization(),
                    file=file,
                )
            made[precision] = Case(
                module=module,
                data=synthetic([spec], samples=8, seed=0),
                sizes=[4] if integers else [1, 2, 4],
                runtime="executorch",
                precision=precision,
                least_snr_db=least[precision],
                artifact=file,
                inputs=["image"],
                outputs=["output"],
                output_names=[],
                calibration=calibration,
                quantization=Quantization(),
                threads=1,
            )
        return made[precision]

    return case


def _scaled(path: str, factor: float) -> Callable[..., Any]:
    """A lowering that scales one tensor of the program."""

    def broken(program: torch.export.ExportedProgram, *, dynamic: bool) -> Any:
        name = next(name for name in program.state_dict if name.removeprefix("inner.").endswith(path))
        program.state_dict[name] = nn.Parameter(program.state_dict[name] * factor)
        return lower(program, dynamic=dynamic)

    return broken


def test_a_right_artifact_is_called_unclear_and_never_blamed(case_of: Callable[[str], Case]) -> None:
    with pytest.raises(UnclearError, match="the outputs agree"):
        bisect(case_of("int8"))


def test_an_int8_artifact_of_other_weights_is_a_damaged_file_and_no_module(
    case_of: Callable[[str], Case], module: nn.Module, tmp_path: Path
) -> None:
    case = case_of("int8")
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.shared.weight.neg_()
    file = tmp_path / "other.pte"
    with quiet():
        ExecuTorchExporter().export(
            capture(other, [FIXED]),
            precision="int8",
            calibration=case.calibration,
            quantization=Quantization(),
            file=file,
        )
    found = bisect(replace(case, artifact=file))
    assert found.stage == "lower"
    assert found.place.module is None
    assert "damaged" in found.sentence


def test_a_wrong_lowering_in_float16_is_found_in_its_module(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = case_of("float16")
    monkeypatch.setattr("exporters.executorch.lower", _scaled("shared.weight", -1.0))
    with quiet():
        captured = capture(case.module, [SPEC])
        ExecuTorchExporter().export(
            captured,
            precision="float16",
            calibration=[],
            quantization=Quantization(),
            file=tmp_path / "m.pte",
        )
    found = bisect(replace(case, artifact=tmp_path / "m.pte"))
    assert (found.stage, found.place.module, found.place.call) == ("lower", "shared", 0)


def test_an_export_that_changes_a_module_called_twice_names_its_first_call(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters import capture as exporting

    honest = exporting._export

    def broken(exported: nn.Module, *arguments: Any, **options: Any) -> Any:
        program = honest(exported, *arguments, **options)
        if isinstance(exported, SharedPair):
            program.state_dict["shared.bias"] = nn.Parameter(program.state_dict["shared.bias"] + 0.1)
        return program

    monkeypatch.setattr(exporting, "_export", broken)
    twice = copy.deepcopy(case_of("float32").module)
    twice.twice = True
    found = bisect(replace(case_of("float32"), module=twice))
    assert (found.stage, found.place.module, found.place.call) == ("export", "shared", 0)


def test_a_quantizer_that_stands_still_is_found_although_its_snr_would_pass(
    module: nn.Module, case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large biases: constant outputs reach the asked SNR, and only their standing still gives them away."""
    biased = copy.deepcopy(module)
    with torch.no_grad():
        biased.head.bias.add_(8.0)
    from exporters import executorch

    honest = executorch.quantize

    def broken(captured: Any, graph: Any, *rest: Any) -> Any:
        still = copy.deepcopy(graph)
        still.head.weight = nn.Parameter(torch.zeros_like(still.head.weight))
        return honest(captured, still, *rest)

    monkeypatch.setattr(executorch, "quantize", broken)
    found = bisect(replace(case_of("int8"), module=biased))
    assert found.snr_db > found.threshold_db
    assert (found.stage, found.place.module) == ("quantize", "head")


def test_a_search_that_fails_itself_says_so_and_does_not_raise(case_of: Callable[[str], Case]) -> None:
    sentence = explain(replace(case_of("int8"), artifact=Path("nowhere.pte")))
    assert sentence.startswith("the stage could not be narrowed down: ")
    assert "nowhere.pte" in sentence
    absent = replace(case_of("int8"), inputs=["nothing"])
    assert "could not be narrowed down: KeyError" in explain(absent)


def test_hooks_are_removed_and_the_module_is_unchanged(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("float32")
    before = {name: value.clone() for name, value in case.module.state_dict().items()}

    def broken(graph: torch.fx.GraphModule) -> None:
        graph.stem.get_submodule("0").weight = nn.Parameter(graph.stem.get_submodule("0").weight * 1.5)

    monkeypatch.setattr("exporters.capture._fold_batch_norms_", broken)
    found = bisect(case)
    assert (found.stage, found.place.module) == ("fold", "stem.0")
    assert not any(each._forward_hooks for each in case.module.modules())
    for name, value in case.module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy())
