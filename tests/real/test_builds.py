"""The real projects through `deploy build --target galaxy-s22`: what the manifests claim holds.

Builds run one after the other: two at once would disturb each other's latency. The order of the tests
follows the projects, each is built once.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.compare import snr_db
from calibration.spec import TensorSpec
from exporters.remote import RemoteSession

HERE = Path(__file__).parent
TRAINED = ["resnet20", "resnet56", "resnet8", "ds_cnn"]
RANDOM = ["mobilenet_v2", "resnet18"]
CONTROL_FLOW = ["cond", "scan", "lstm", "dict_output"]
BUILDABLE = [*TRAINED, "minilm", *RANDOM, *CONTROL_FLOW]
PRUNED = [*TRAINED, "dict_output"]
UNPRUNABLE = ["cond", "scan", "lstm"]
LARGEST_BATCH = {"minilm": 8, "mobilenet_v2": 2, "resnet18": 2}

# A program is weights and about 20 kB of instructions and scales, which int8 does not shrink: of
# DS-CNN's 106 kB the weights are 92.
LEAST_SHRINKING = {"resnet20": 3.0, "resnet56": 3.0, "resnet8": 3.0, "ds_cnn": 2.0}

Build = Callable[[str], Any]


@pytest.fixture(scope="session")
def build(
    preparation: ModuleType, real_project: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Build:
    """The build of a project by name, made at the first call; skips as real_project does."""
    building = preparation.load_file(HERE / "builds.py")
    cache = tmp_path_factory.mktemp("cache")
    ended: dict[str, Any] = {}

    def built(name: str) -> Any:
        if name not in ended:
            ended[name] = building.build(real_project(name), cache)
        return ended[name]

    return built


@pytest.fixture(scope="session", autouse=True)
def projects_before() -> dict[str, str]:
    """The projects' own files as they were before any build."""
    return projects_now()


def projects_now() -> dict[str, str]:
    """SHA-256 of every file of the projects, by path."""
    files = (file for file in (HERE / "projects").rglob("*") if file.is_file())
    return {
        str(file.relative_to(HERE)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if "__pycache__" not in file.parts
    }


@pytest.fixture
def built(build: Build, request: pytest.FixtureRequest) -> Any:
    """The finished build of the project that the test is parametrized with."""
    done = build(request.param)
    assert done.code == 0, done.stderr or done.stdout
    return done


def each(*names: str) -> pytest.MarkDecorator:
    """The test once a project."""
    return pytest.mark.parametrize("built", names, indirect=True)


@each(*BUILDABLE)
def test_it_builds_and_prints_the_manifest_that_it_leaves(built: Any) -> None:
    assert json.loads(built.stdout) == json.loads((built.folder / "manifest.json").read_text())
    for file in built.manifest.files:
        assert hashlib.sha256((built.folder / file.path).read_bytes()).hexdigest() == file.sha256


@each(*BUILDABLE)
def test_the_shipped_rung_keeps_parity_and_the_accuracy_limit(built: Any) -> None:
    shipped = built.shipped
    assert shipped.dropped is None
    assert shipped.parity.input_sensitive
    assert shipped.parity.snr_db >= shipped.parity.min_snr_db
    for line in (line for line in built.manifest.budget if line.name == "max_drop"):
        assert line.value <= line.limit
        assert line.verdict in ("met", "uncertain")


@each(*BUILDABLE)
def test_a_dropped_rung_says_why_with_numbers(built: Any) -> None:
    for rung in built.rungs.values():
        if rung.dropped is not None:
            assert any(character.isdigit() for character in rung.dropped), rung.name
            assert rung.name != built.manifest.shipped_rung


@each(*BUILDABLE)
def test_dense_float_computes_what_the_module_does_at_the_smallest_two_and_largest_batch(built: Any) -> None:
    parity = built.rungs["dense-float"].parity
    assert parity.snr_db >= 80
    assert parity.batches == sorted({1, 2, LARGEST_BATCH.get(built.name, 16)})


@each(*BUILDABLE)
def test_the_golden_pair_is_what_a_fresh_process_answers(built: Any) -> None:
    wanted, given = answers_again(built)
    assert list(wanted) == [output.name for output in built.manifest.outputs]
    for name, array in wanted.items():
        assert snr_db(array, given[name]) >= 80


def answers_again(built: Any) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """expected.npz, and what the program answers now to inputs.npz."""
    manifest = built.manifest
    inputs, expected = (dict(np.load(built.folder / f"{name}.npz")) for name in ("inputs", "expected"))
    (program,) = [file.path for file in manifest.files if file.role == "program"]
    specs = [
        TensorSpec(
            name=i.name,
            shape=tuple(i.shape),
            dtype=i.dtype,
            bounds={name: (low, high) for name, (low, high) in i.dynamic.items()},
        )
        for i in manifest.inputs
    ]
    with RemoteSession(
        manifest.runtime,
        built.folder / program,
        inputs=specs,
        outputs=[output.name for output in manifest.outputs],
        threads=manifest.recommended.threads,
    ) as session:
        return expected, session.run(inputs)


@each(*BUILDABLE)
def test_the_shipped_rung_is_not_slower_than_dense_float(built: Any) -> None:
    shipped, dense = built.shipped.latency, built.rungs["dense-float"].latency
    assert shipped.ci95_ms[0] <= dense.ci95_ms[1]


@each(*BUILDABLE)
def test_latency_is_this_machines_and_settles_no_budget_of_the_phone(built: Any) -> None:
    assert built.manifest.chosen_by == "host-proxy"
    for rung in built.rungs.values():
        if rung.latency.median_ms is None:
            assert rung.latency.reason
        else:
            assert rung.latency.samples >= 30
            assert rung.latency.measured_on.kind == "host"
    timed = [line for line in built.manifest.budget if line.name in ("latency_ms", "peak_memory_mb")]
    assert all(line.verdict == "unmeasured" and "deploy validate" in line.how for line in timed)


@each(*TRAINED)
def test_int8_stays_within_a_point_of_float_and_is_a_fraction_of_its_size(built: Any) -> None:
    dense, quantized = built.rungs["dense-float"], built.rungs["dense-int8"]
    assert quantized.accuracy.drop <= 0.01
    assert quantized.accuracy.samples == 500
    assert dense.size_bytes >= LEAST_SHRINKING[built.name] * quantized.size_bytes


@each(*PRUNED)
def test_pruning_reaches_what_was_asked_or_says_why_not(built: Any) -> None:
    asked = [line for line in built.report.pruning if line.asked]
    assert asked
    assert all(abs(line.achieved - line.asked) <= 0.02 or line.note for line in asked)
    pruned, dense = built.rungs["pruned-float"], built.rungs["dense-float"]
    assert pruned.parameters < dense.parameters
    assert pruned.sparsity == pytest.approx(1 - pruned.macs / dense.macs, abs=1e-4)


@each(*UNPRUNABLE)
def test_where_nothing_can_be_pruned_the_dense_rungs_ship_and_a_warning_says_so(built: Any) -> None:
    assert any("nothing was pruned" in warning for warning in built.manifest.warnings)
    assert not any(name.startswith("pruned") for name in built.rungs)


@each("minilm")
def test_the_encoder_keeps_its_embeddings_in_dynamic_int8_and_is_smaller(built: Any) -> None:
    dense, quantized = built.rungs["dense-float"], built.rungs["dense-int8-dynamic"]
    assert [i.dtype for i in built.manifest.inputs] == ["int64", "int64"]
    assert quantized.accuracy.metric == "embedding-cosine"
    assert quantized.accuracy.drop <= 0.01
    assert dense.size_bytes > 1.3 * quantized.size_bytes


@each(*RANDOM)
def test_random_weights_are_timed_and_their_accuracy_is_unmeasured(built: Any) -> None:
    assert all(rung.accuracy.verdict == "unmeasured" for rung in built.rungs.values())
    assert all(rung.accuracy.value is None for rung in built.rungs.values())
    warnings = " ".join(built.manifest.warnings)
    assert "calibration data is synthetic" in warnings
    assert "accuracy stays unmeasured" in warnings
    assert "nothing is pruned" in warnings
    assert built.shipped.latency.median_ms > 0


@each("dict_output")
def test_outputs_of_a_dictionary_keep_their_keys(built: Any) -> None:
    assert {o.name: o.shape for o in built.manifest.outputs} == {"digit": ["batch", 10], "odd": ["batch", 2]}


def test_while_loop_is_refused_by_name_and_leaves_nothing_behind(build: Build) -> None:
    refused = build("while_loop")
    assert refused.code == 4
    assert "while_loop" in json.loads(refused.stdout)["error"]["message"]
    assert "Traceback" not in refused.stderr
    left = [file for file in (refused.work / "out").rglob("*") if file.is_file()]
    assert not left


def test_building_changes_no_project(build: Build, projects_before: dict[str, str]) -> None:
    assert projects_now() == projects_before
