"""deploy compare says what changed between two builds, no more than the measurements support."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from deploy.cli.compare import command
from deploy.manifest import (
    Accuracy,
    BudgetLine,
    Environment,
    Latency,
    Machine,
    Manifest,
    Provenance,
    Recommended,
    Rung,
    encode,
)
from deploy.reporting.comparison import Comparison, compare, render
from targets.errors import UsageError

HOST = Machine(kind="host", name="build machine", cpu="EPYC 7B13")
PHONE = Machine(kind="adb", name="SM-S901B", cpu="Cortex-X2")


def timed(low: float, median: float, high: float, on: Machine = HOST) -> Latency:
    return Latency(
        median_ms=median,
        p90_ms=high,
        p99_ms=high,
        ci95_ms=[low, high],
        samples=200,
        threads=1,
        measured_on=on,
    )


def judged(drop: float, low: float, high: float) -> Accuracy:
    return Accuracy(
        metric="accuracy", value=0.95 - drop, drop=drop, drop_ci95=[low, high], samples=360, verdict="met"
    )


def rung(name: str = "dense-int8", **changes: Any) -> Rung:
    made = Rung(
        name=name,
        pattern="dense",
        precision="int8",
        sparsity=0.0,
        parameters=100,
        macs=1000,
        size_bytes=300_000,
        accuracy=judged(0.002, 0.001, 0.003),
        parity=None,
        latency=timed(0.98, 1.0, 1.02),
        peak_memory_bytes=None,
        delegation=None,
        reason="fastest",
    )
    return replace(made, **changes)


def build(*rungs: Rung, **changes: Any) -> Manifest:
    shown = rungs or (rung(),)
    made = Manifest(
        model="digits",
        target="galaxy-s22",
        chip="c",
        created_at="2026-11-22T10:00:00Z",
        runtime="executorch",
        precision="int8",
        shipped_rung=shown[0].name,
        chosen_by="device",
        fallback=None,
        files=[],
        inputs=[],
        outputs=[],
        recommended=Recommended(threads=1, batch=1),
        rungs=list(shown),
        budget=[BudgetLine(name="size_mb", limit=0.5, value=0.3, verdict="met")],
        licences=[],
        environment=Environment(packages={"torch": "2.13.0"}, python="3.11.9", os="Linux", cpu="x"),
        provenance=Provenance(
            model_sha256="0d" * 32, calibration_sha256=None, config_sha256="2f" * 32, seed=0
        ),
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("latency", "verdict"),
    [
        (timed(0.60, 0.62, 0.64), "faster"),
        (timed(1.30, 1.32, 1.34), "slower"),
        (timed(0.99, 1.01, 1.03), "same"),
        (timed(0.70, 0.90, 1.10), "unresolved"),
        (timed(0.60, 0.62, 0.64, PHONE), "not comparable"),
        (replace(timed(1, 1, 1), median_ms=None, reason="no device"), "unmeasured"),
        (replace(timed(0.5, 0.5, 0.5), ci95_ms=None), "unresolved"),
    ],
)
def test_latency_is_judged_by_its_intervals_and_only_on_one_machine(latency: Latency, verdict: str) -> None:
    assert compare(build(), build(rung(latency=latency))).latency.verdict == verdict


def test_latencies_of_different_machines_get_no_ratio_and_both_machines_are_named() -> None:
    found = compare(build(), build(rung(latency=timed(0.5, 0.5, 0.5, PHONE)))).latency
    assert found.ratio is None
    assert "build machine (EPYC 7B13)" in found.why
    assert "SM-S901B (Cortex-X2)" in found.why


def test_faster_tells_how_many_times() -> None:
    found = compare(build(), build(rung(latency=timed(0.49, 0.5, 0.51))))
    assert found.latency.ratio == pytest.approx(2.0)
    assert "2.00× faster" in render(found)


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (judged(0.002, 0.001, 0.003), "same"),
        (judged(0.010, 0.005, 0.015), "worse"),
        (judged(-0.010, -0.015, -0.005), "better"),
        (judged(0.003, 0.000, 0.006), "unresolved"),
        (replace(judged(0.1, 0.1, 0.1), metric="f1"), "not comparable"),
        (replace(judged(0.1, 0.1, 0.1), samples=99), "not comparable"),
        (replace(judged(0.1, 0.1, 0.1), verdict="unmeasured", reason="synthetic data"), "unmeasured"),
    ],
)
def test_accuracy_is_judged_by_the_intervals_of_the_drops(accuracy: Accuracy, verdict: str) -> None:
    assert compare(build(), build(rung(accuracy=accuracy))).accuracy.verdict == verdict


def test_drops_against_different_dense_models_are_not_compared() -> None:
    other = replace(build().provenance, model_sha256="ff" * 32)
    worse = build(rung(accuracy=judged(0.1, 0.1, 0.1)), provenance=other)
    assert compare(build(), worse).accuracy.verdict == "not comparable"


def test_any_difference_of_size_is_real() -> None:
    found = compare(build(), build(rung(size_bytes=299_000)))
    assert found.size.verdict == "smaller"
    assert "0.33% smaller" in render(found)
    assert compare(build(), build()).size.verdict == "same"


def test_rungs_added_removed_and_changed_are_told_apart() -> None:
    a = build(rung(), rung("dense-float"), rung("pruned-int8"))
    b = build(rung(), rung("pruned-int8", dropped="too slow"), rung("pruned-float"))
    found = compare(a, b)
    assert (found.rungs_added, found.rungs_removed) == (["pruned-float"], ["dense-float"])
    assert [change.name for change in found.rungs_changed] == ["pruned-int8"]
    assert "~ pruned-int8: now dropped: too slow" in render(found)


def test_versions_hashes_budget_and_facts_that_differ_are_listed_and_no_others() -> None:
    a = build()
    b = build(
        environment=replace(a.environment, packages={"torch": "2.13.1", "onnx": "1.19"}),
        provenance=replace(a.provenance, calibration_sha256="ab" * 32),
        budget=[replace(a.budget[0], verdict="missed")],
        runtime="onnx",
    )
    found = compare(a, b)
    assert [(one.name, one.a, one.b) for one in found.versions] == [
        ("torch", "2.13.0", "2.13.1"),
        ("onnx", None, "1.19"),
    ]
    assert [one.name for one in found.provenance] == ["calibration data"]
    assert [(one.a, one.b) for one in found.budget] == [("0.5 MB met", "0.5 MB missed")]
    assert [one.name for one in found.facts] == ["runtime"]


def test_a_build_against_itself_differs_in_nothing() -> None:
    found = compare(build(), build())
    assert (found.size.verdict, found.latency.verdict, found.accuracy.verdict) == ("same", "same", "same")
    assert found.facts == found.versions == found.provenance == found.budget == []
    assert found.notes == found.rungs_added == found.rungs_removed == found.rungs_changed == []


def test_host_proxy_latencies_are_said_not_to_be_the_targets() -> None:
    proxy = build(chosen_by="host-proxy")
    assert "not of galaxy-s22" in render(compare(proxy, proxy))
    assert "different evidence: device; host-proxy" in render(compare(build(), proxy))


def test_builds_of_different_models_and_without_a_shipped_rung_are_compared_honestly() -> None:
    found = compare(build(model="digits"), build(model="letters", shipped_rung="gone"))
    assert "These are builds of different models." in found.notes
    assert found.latency.verdict == found.size.verdict == found.accuracy.verdict == "unmeasured"


def test_control_characters_of_a_name_never_reach_the_terminal() -> None:
    assert "\x1b" not in render(compare(build(model="\x1b[2J"), build()))


def test_command_prints_text_or_json_alone(tmp_path: Path) -> None:
    for name, made in (("a", build()), ("b", build(rung(size_bytes=150_000)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(encode(made))
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    text = CliRunner().invoke(command, paths)
    assert text.exit_code == 0, text.output
    assert "2.00× smaller" in text.output
    raw = CliRunner().invoke(command, [*paths, "--json"])
    assert json.loads(raw.output)["size"] == {"verdict": "smaller", "ratio": 0.5}
    assert msgspec.json.decode(raw.output, type=Comparison) == compare(
        build(), build(rung(size_bytes=150_000))
    )


def test_command_names_the_folder_that_holds_no_build(tmp_path: Path) -> None:
    found = CliRunner().invoke(command, [str(tmp_path / "none"), str(tmp_path)])
    assert isinstance(found.exception, UsageError)
    assert "none" in found.exception.message
