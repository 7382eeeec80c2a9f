"""The truth table: what it says, what the planner picks from it, and how it refuses."""

import msgspec
import pytest

from targets import catalog, truth
from targets.errors import UsageError
from targets.profile import Accelerator, Chip, RuntimeSupport

PICKED = {
    "galaxy-s22": "structured",
    "sm8450": "structured",
    "exynos-2200": "structured",
    "galaxy-s24": "structured",
    "pixel-8": "structured",
    "iphone-15": "structured",
    "ethos-u55": "structured",
    "ethos-u85": "structured",
    "intel-npu": "structured",
    "coral-edge-tpu": "structured",
    "web": "structured",
    "laptop": "structured",
    "mi300x": "structured",
    "xeon": "structured",
    "host": "structured",
    "a100": "2:4",
    "h100": "2:4",
    "h200": "2:4",
    "l4": "2:4",
    "a10g": "2:4",
    "rtx-4090": "2:4",
    "jetson-orin-nano": "2:4",
    "jetson-agx-orin": "2:4",
}


def first(name: str) -> tuple[Chip, RuntimeSupport]:
    chip = catalog.find(name).chips[0]
    return chip, chip.runtimes[0]


def runtime_of(chip: Chip, name: str) -> RuntimeSupport:
    return next(runtime for runtime in chip.runtimes if runtime.name == name)


@pytest.mark.parametrize(("name", "pattern"), PICKED.items())
def test_the_target_picks_the_pattern(name: str, pattern: str) -> None:
    for chip in catalog.find(name).chips:
        assert truth.choose_pattern(chip, chip.runtimes[0]).pattern == pattern


def test_the_xeon_takes_unstructured_with_deepsparse_only_where_its_licence_is_accepted() -> None:
    chip = catalog.find("xeon").chips[0]
    runtime = runtime_of(chip, "deepsparse")
    accepted = truth.choose_pattern(chip, runtime, accepted_licences=("deepsparse",))
    assert accepted.pattern == "unstructured"
    declined = truth.choose_pattern(chip, runtime)
    assert declined.pattern == "structured"
    assert any("--accept-license deepsparse" in refused.instead for refused in declined.refused)


def test_two_four_needs_the_sparse_tensor_cores_and_a_precision_they_take() -> None:
    features = ("sm_80", "sparse_tensor_cores")
    assert truth.executes("tensorrt", "2:4", "int8", features)
    assert truth.executes("tensorrt", "2:4", None, features)
    assert truth.executes("tensorrt", "2:4", "int8", ("sm_75",)) is None
    assert truth.executes("tensorrt", "2:4", "float32", features) is None
    assert truth.executes("executorch", "2:4", "int8", features) is None


def test_a_gpu_without_sparse_tensor_cores_falls_to_structured_and_says_what_it_lacks() -> None:
    chip, runtime = first("a100")
    older = msgspec.structs.replace(
        chip, accelerators=(Accelerator(name="Turing", kind="gpu", features=("sm_75",)),)
    )
    choice = truth.choose_pattern(older, runtime)
    assert choice.pattern == "structured"
    assert any("needs sparse_tensor_cores" in refused.reason for refused in choice.refused)


def test_openvino_packs_sparse_weights_with_amx_alone_and_only_on_request() -> None:
    assert truth.executes("openvino", "unstructured", "int8", ("avx2", "amx_int8"))
    assert truth.executes("openvino", "unstructured", "float32", ("avx2", "amx_int8")) is None
    assert truth.executes("openvino", "unstructured", "int8", ("avx2", "avx512_vnni")) is None
    chip = catalog.find("xeon").chips[0]
    assert truth.choose_pattern(chip, runtime_of(chip, "openvino")).pattern == "structured"


@pytest.mark.parametrize("runtime", ["executorch", "onnxruntime"])
def test_float_zeros_bring_nothing_where_kernels_skip_none(runtime: str) -> None:
    assert truth.executes(runtime, "unstructured", "float32", ("avx2", "avx512_vnni", "amx_int8")) is None
    row = truth.lookup(runtime, "unstructured", "float32", ())
    assert row is not None
    assert row.verdict == "no gain"


def test_structured_and_dense_run_on_any_runtime_even_an_unknown_one() -> None:
    for pattern in ("structured", "dense"):
        row = truth.executes("some-future-runtime", pattern, "int8", ())
        assert row is not None
        assert row.runtime == truth.ANY
    own = truth.executes("executorch", "structured", "int8", ())
    assert own is not None
    assert own.runtime == "executorch"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block", "tiers", "4:8"])
def test_a_useless_pattern_on_the_phone_is_refused_with_reason_alternative_and_the_way_to_storage(
    pattern: str,
) -> None:
    chip, runtime = first("galaxy-s22")
    with pytest.raises(UsageError) as caught:
        truth.require_executable(chip, runtime, pattern)
    assert caught.value.exit_code == 2
    message = caught.value.message
    assert pattern in message
    assert "structured in steps of 8 channels works here" in message
    assert "--objective size" in message
    assert "for storage only" in message


def test_a_refusal_names_another_runtime_of_the_chip_that_would_gain() -> None:
    chip = catalog.find("epyc").chips[0]
    refused = truth.explain_refusal(chip, runtime_of(chip, "onnxruntime"), "unstructured")
    assert "unstructured with --runtime deepsparse --accept-license deepsparse" in refused.instead


def test_a_refused_precision_is_explained_by_those_that_would_do() -> None:
    chip, runtime = first("a100")
    refused = truth.explain_refusal(chip, runtime, "2:4", precision="float32")
    assert "float16" in refused.reason
    assert "not in float32" in refused.reason


def test_what_pays_is_allowed() -> None:
    chip, runtime = first("h200")
    assert truth.require_executable(chip, runtime, "2:4").multiple == 4
    phone, executorch = first("galaxy-s22")
    assert truth.require_executable(phone, executorch, "structured").source.startswith("measured")
    assert truth.require_executable(phone, executorch, "dense").verdict == "baseline"


def test_a_word_that_is_no_pattern_gets_the_nearest() -> None:
    chip, runtime = first("galaxy-s22")
    with pytest.raises(UsageError, match=r"(?i)did you mean unstructured"):
        truth.require_executable(chip, runtime, "unstructred")
    for word in ("0:4", ":4", "2:", "2:4:8"):
        with pytest.raises(UsageError, match="no pattern"):
            truth.check_pattern(word)


def test_the_first_available_runtime_whose_terms_are_accepted_is_chosen() -> None:
    chip = catalog.find("xeon").chips[0]
    everything = {runtime.name for runtime in chip.runtimes}

    def chosen(available: set[str], *licences: str) -> str | None:
        runtime = truth.choose_runtime(chip, available=available, accepted_licences=licences).runtime
        return runtime.name if runtime else None

    assert chosen(everything) == "openvino"
    assert chosen(everything, "deepsparse") == "deepsparse"
    assert chosen({"executorch"}, "deepsparse") == "executorch"
    assert chosen(set()) is None


def test_a_target_no_runtime_is_available_for_can_still_be_planned() -> None:
    choice = truth.choose_runtime(catalog.find("h200").chips[0], available={"executorch"})
    assert choice.runtime is None
    assert choice.preferred.name == "tensorrt"
    assert [refused.what for refused in choice.refused] == ["tensorrt", "aoti"]


def test_every_row_has_a_source_and_a_reason_and_ranks_only_what_pays() -> None:
    for row in truth.TABLE:
        assert row.source
        assert row.why
        assert (row.rank > 0) == (row.verdict == "faster")


def test_no_two_rows_say_the_same_or_contradict_under_the_same_conditions() -> None:
    keys = [(row.runtime, row.pattern, row.precisions, row.needs) for row in truth.TABLE]
    assert len(keys) == len(set(keys))


def test_every_feature_a_row_needs_is_one_that_some_profile_or_detection_states() -> None:
    from targets.detect import ARM_FLAGS, X86_FLAGS

    stated = {*X86_FLAGS.values(), *ARM_FLAGS.values()}
    for target in catalog.all_targets():
        for chip in target.chips:
            stated |= {*chip.features, *(word for unit in chip.accelerators for word in unit.features)}
    assert {need for row in truth.TABLE for need in row.needs} <= stated


def test_features_stand_in_profiles_and_no_profile_states_what_executes_faster() -> None:
    """A pattern's name in a profile would be a promise outside the table."""
    for target in catalog.all_targets():
        for chip in target.chips:
            words = {*chip.features, *(word for unit in chip.accelerators for word in unit.features)}
            assert not words & {*truth.PATTERNS}
    names = {field.name for field in msgspec.structs.fields(Chip)}
    names |= {field.name for field in msgspec.structs.fields(RuntimeSupport)}
    assert not any("pattern" in name or "sparsity" in name for name in names)


def test_no_code_of_this_package_asks_for_a_target_or_runtime_by_name() -> None:
    """Names of runtimes and targets stand in the tables only; functions below the tables are free of them."""
    import inspect

    words = {target.name for target in catalog.all_targets()} - {"host", "web"}
    words |= {runtime.name for t in catalog.all_targets() for chip in t.chips for runtime in chip.runtimes}
    for function in vars(truth).values():
        if inspect.isfunction(function) and function.__module__ == truth.__name__:
            assert not [word for word in words if f'"{word}"' in inspect.getsource(function)]
