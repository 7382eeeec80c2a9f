"""The benchmarks count right, and docs/performance.md shows what was recorded."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("start_up", "overhead", "gains", "quick_starts", "server", "soak", "sparse")


def load(name: str) -> ModuleType:
    """A module of benchmarks/, which is no installed package."""
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks",
            ROOT / "benchmarks" / "__init__.py",
            submodule_search_locations=[str(ROOT / "benchmarks")],
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.{name}")


measuring = load("measuring")
render = load("render")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help_runs_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--runs", "--json", "--output-dir"))


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - {"soak"}))  # a soak is one long run
def test_too_few_runs_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--runs", "2"])
    assert ended.value.code == 2
    assert "at least" in capsys.readouterr().err


def test_ratios_are_taken_pair_by_pair() -> None:
    assert measuring.ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        measuring.ratios([1.0, 2.0], [1.0])


def test_a_disturbed_run_moves_neither_median_nor_interval() -> None:
    summary = measuring.summarise([1.0] * 14 + [50.0])
    assert (summary.median, summary.interval, summary.largest) == (1.0, (1.0, 1.0), 50.0)


def test_the_interval_of_the_median_is_the_order_statistics_of_the_sign_test() -> None:
    # n = 11: P(B < 2) = 12 / 2048 <= 0.025 and P(B < 3) = 67 / 2048 > 0.025, so the 2nd and the 10th.
    summary = measuring.summarise([float(i) for i in range(1, 12)])
    assert (summary.median, summary.interval) == (6.0, (2.0, 10.0))


def test_cpu_time_of_a_child_counts_its_own_children() -> None:
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}], check=True)"
    usage = measuring.run_child([sys.executable, "-c", nested])
    assert 0.3 <= usage.cpu_s < 1.5
    assert usage.peak_bytes > 1_000_000


def test_peak_memory_sees_what_the_child_touched_and_nothing_of_the_starter() -> None:
    own = b"1" * 400_000_000
    usage = measuring.run_child(
        [sys.executable, "-c", "x = bytearray(200_000_000); x[::4096] = b'1' * 48829"]
    )
    assert 200e6 <= usage.peak_bytes < 300e6 < len(own)


def test_a_child_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        measuring.run_child([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_rounds_alternate_and_warm_ups_are_not_counted() -> None:
    order: list[str] = []

    def maker(name: str) -> object:
        def make(turn: int) -> object:
            order.append(f"{name}{turn}")
            return measuring.Usage(cpu_s=turn, wall_s=1.0, peak_bytes=1, tree_bytes=1)

        return make

    results = measuring.interleaved({"a": maker("a"), "b": maker("b")}, runs=2)
    assert order == ["b-1", "a-1", "a0", "b0", "b1", "a1"]
    assert [usage.cpu_s for usage in results["a"]] == [0, 1]


def test_sampling_is_taken_off_the_builds_cpu_time_only() -> None:
    def usage(cpu_s: float, peak: int) -> object:
        return measuring.Usage(cpu_s=cpu_s, wall_s=1.0, peak_bytes=peak, tree_bytes=peak)

    found = load("overhead").compared(
        {"build": [usage(13.0, 300)] * 5, "bare": [usage(10.0, 250)] * 5}, [1.0] * 5
    )
    assert found["cpu_ratio"]["median"] == pytest.approx(1.2)
    assert found["cpu_ratio_with_sampling"]["median"] == pytest.approx(1.3)
    assert found["memory_ratio"]["median"] == pytest.approx(1.2)


class Clock:
    """A session whose calls take a known time."""

    def __init__(self, nanoseconds: int) -> None:
        self.nanoseconds = nanoseconds

    def time(self, calls: int) -> list[int]:
        return [self.nanoseconds] * calls


def test_rounds_give_the_time_of_a_call_in_milliseconds() -> None:
    times = load("gains").rounds_of({"slow": Clock(4_000_000), "fast": Clock(1_000_000)}, 7)
    assert times == {"slow": [4.0] * 7, "fast": [1.0] * 7}


def shipped(*, speed: tuple[float, float], smaller: float, drop: tuple[float, float]) -> dict[str, object]:
    return {
        "faster_than_eager": {"interval": speed},
        "smaller_than_eager": smaller,
        "drop": sum(drop) / 2,
        "drop_ci95": list(drop),
    }


def test_the_goal_is_met_only_by_whole_intervals() -> None:
    goal = load("gains").goal
    met = goal(shipped(speed=(3.1, 3.4), smaller=6.1, drop=(-0.01, 0.009)))
    assert met == {"speed": "met", "size": "met", "accuracy": "met"}
    unsure = goal(shipped(speed=(2.9, 3.1), smaller=5.9, drop=(0.0, 0.02)))
    assert unsure == {"speed": "uncertain", "size": "missed", "accuracy": "uncertain"}
    missed = goal(shipped(speed=(2.0, 2.9), smaller=1.0, drop=(0.02, 0.05)))
    assert missed == {"speed": "missed", "size": "missed", "accuracy": "missed"}


def pruned(*, speed: tuple[float, float], smaller: float, drop: float) -> list[dict[str, object]]:
    faster = {"median": sum(speed) / 2, "interval": list(speed)}
    return [
        {"name": "pruned-int8", "faster_than_int8": faster, "smaller_than_int8": smaller, "drop": drop},
    ]


def test_pruning_pays_where_it_gains_and_keeps_accuracy() -> None:
    pays = load("gains").pruning_pays
    assert pays(pruned(speed=(1.1, 1.2), smaller=1.0, drop=0.01))["pays"]
    assert pays(pruned(speed=(0.9, 1.0), smaller=1.2, drop=-0.01))["pays"]
    assert pays(pruned(speed=(1.0, 1.2), smaller=1.04, drop=0.0))["why"] == "neither faster nor smaller by 5%"
    assert pays(pruned(speed=(2.0, 2.1), smaller=2.0, drop=0.02))["why"] == "loses more than a point"
    assert pays([{"name": "dense-int8"}]) is None


def test_a_million_answers_cost_what_the_hours_for_them_do() -> None:
    rows = [{"per_second": {"median": rate}} for rate in (500.0, 1000.0)]
    assert load("server").cost_per_million(rows, 0.36) == pytest.approx(0.1)


def test_results_of_all_scripts_are_recorded() -> None:
    assert sorted(render.read_results(render.RESULTS)) == sorted([*SCRIPTS, "quick_starts_resnet50"])


def test_the_page_shows_the_recorded_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert render.rendered(page, render.read_results(render.RESULTS)) == page


def test_a_changed_number_changes_the_page() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    result = json.loads((render.RESULTS / "start_up.json").read_text(encoding="utf-8"))
    result["rows"][0]["cpu_s"]["median"] = 0.123456
    assert "0.123 [" in render.rendered(page, {"start_up": result})


def test_a_page_without_markers_is_refused() -> None:
    result = json.loads((render.RESULTS / "start_up.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="markers"):
        render.rendered("# Performance\n", {"start_up": result})


def test_recorded_command_lines_name_no_folder_of_a_machine() -> None:
    shown = measuring.shown_command("gains", ["--runs", "7", "-o", str(ROOT / "out"), "--work", "kept/here"])
    assert shown == "python -m benchmarks.gains --runs 7 -o out --work kept/here"
