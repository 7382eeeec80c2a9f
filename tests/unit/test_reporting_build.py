"""report.html and the terminal summary tell the truth of a build, whatever the build is like."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

from deploy.manifest import (
    Accuracy,
    Asked,
    BudgetLine,
    Delegation,
    Environment,
    File,
    Input,
    Latency,
    LayerSensitivity,
    LayerWidths,
    LeftOut,
    Machine,
    Manifest,
    Output,
    Parity,
    PlanRecord,
    PlanStep,
    Provenance,
    Recommended,
    RecoveryPoint,
    Refusal,
    Report,
    Rung,
    Stage,
)
from deploy.reporting import charts, units
from deploy.reporting.claims import headline, notices
from deploy.reporting.html import render_report
from deploy.reporting.terminal import print_summary

HOST = Machine(kind="host", name="build machine", cpu="EPYC 7B13")
PHONE = Machine(kind="adb", name="SM-S901B", cpu="Cortex-X2")
COMMAND = "deploy validate build/digits/galaxy-s22 --device adb"
UNJUDGED = Accuracy(
    metric=None,
    value=None,
    drop=None,
    drop_ci95=None,
    samples=0,
    verdict="unmeasured",
    reason="no [evaluate] in deploy.toml",
)
UNTIMED = Latency(
    median_ms=None,
    p90_ms=None,
    p99_ms=None,
    ci95_ms=None,
    samples=0,
    threads=1,
    measured_on=None,
    reason="this machine cannot run it",
)


def accuracy(value: float, drop: float, low: float, high: float, **changes: Any) -> Accuracy:
    judged = Accuracy(
        metric="accuracy", value=value, drop=drop, drop_ci95=[low, high], samples=360, verdict="met"
    )
    return replace(judged, **changes)


def latency(median_ms: float, on: Machine = HOST) -> Latency:
    return Latency(
        median_ms=median_ms,
        p90_ms=median_ms * 1.1,
        p99_ms=median_ms * 1.3,
        ci95_ms=[median_ms * 0.97, median_ms * 1.03],
        samples=200,
        threads=1,
        measured_on=on,
    )


def rung(name: str, size_bytes: int, judged: Accuracy, timed: Latency, **changes: Any) -> Rung:
    pruned = "pruned" in name
    made = Rung(
        name=name,
        pattern="structured" if pruned else "dense",
        precision="int8" if "int8" in name else "float32",
        sparsity=0.4 if pruned else 0.0,
        parameters=272_474,
        macs=41_000_000,
        size_bytes=size_bytes,
        accuracy=judged,
        parity=Parity(
            reference="float module of this rung",
            samples=32,
            snr_db=36.1,
            max_abs_error=1e-4,
            top1_agreement=0.99,
            input_sensitive=True,
        ),
        latency=timed,
        peak_memory_bytes=2_400_000,
        delegation=Delegation(delegate="xnnpack", operators=44, delegated=44),
        reason="within max_drop",
    )
    return replace(made, **changes)


def phone_rungs() -> list[Rung]:
    left = [LeftOut(operator="aten.hardswish", module="stages.2.act", why="no quantized kernel")]
    delegation = Delegation(delegate="xnnpack", operators=44, delegated=43, left=left)
    slow = "1.05× slower than dense-float: the step did not pay"
    return [
        rung("dense-float", 1_112_340, accuracy(0.915, 0.0, 0.0, 0.0), latency(1.92)),
        rung("dense-int8", 312_400, accuracy(0.913, 0.002, -0.004, 0.008), latency(0.951)),
        rung(
            "dense-int8-dynamic",
            1_020_400,
            accuracy(0.914, 0.001, -0.003, 0.005),
            latency(2.05),
            dropped=slow,
        ),
        rung("pruned-float", 662_100, accuracy(0.909, 0.006, 0.001, 0.009), latency(1.22)),
        rung(
            "pruned-int8",
            196_032,
            accuracy(0.908, 0.007, 0.001, 0.009),
            latency(0.612),
            delegation=delegation,
            reason="fastest rung within max_drop",
        ),
    ]


def manifest(**changes: Any) -> Manifest:
    made = Manifest(
        model="digits",
        target="galaxy-s22",
        chip="snapdragon-8-gen-1",
        created_at="2026-11-22T10:00:00Z",
        runtime="executorch",
        precision="int8",
        shipped_rung="pruned-int8",
        chosen_by="host-proxy",
        fallback=None,
        files=[File(path="model-1f3a9c.pte", role="program", size_bytes=196_032, sha256="1f" * 32)],
        inputs=[Input(name="image", shape=["batch", 3, 32, 32], dtype="float32", dynamic={"batch": [1, 64]})],
        outputs=[Output(name="logits", shape=["batch", 10], dtype="float32")],
        recommended=Recommended(threads=1, batch=1),
        rungs=phone_rungs(),
        budget=[
            BudgetLine(name="latency_ms", limit=8, value=None, verdict="unmeasured", how=COMMAND),
            BudgetLine(name="size_mb", limit=0.5, value=0.196, verdict="met"),
        ],
        licences=[],
        environment=Environment(packages={"torch": "2.13.0"}, python="3.11.9", os="Linux", cpu="EPYC 7B13"),
        provenance=Provenance(
            model_sha256="0d" * 32, calibration_sha256=None, config_sha256="2f" * 32, seed=0
        ),
    )
    return replace(made, **changes)


def report(*, manifest: Manifest | None = None, **changes: Any) -> Report:
    shown = manifest or globals()["manifest"]()
    plan = PlanRecord(
        model=shown.model,
        target=shown.target,
        chip=shown.chip,
        runtime=shown.runtime,
        pattern="structured",
        precision="int8",
        steps=[
            PlanStep(name="prune", accepts="torch module", produces="torch module", reason="channels pay"),
            PlanStep(name="lower", accepts="exported graph", produces="edge program", reason="it must"),
        ],
        rungs=[one.name for one in shown.rungs],
        refused=[Refusal(what="2:4", reason="no kernel skips these zeros", instead="channels")],
    )
    return replace(Report(manifest=shown, plan=plan, runner_up="dense-int8"), **changes)


def detailed() -> Report:
    return report(
        widths=[LayerWidths(layer=f"layer{i}.conv", kind="Conv2d", before=64, after=40) for i in range(60)],
        pruning=[Asked(quantity="MACs", asked=0.4, achieved=0.41, note="rounded to 8")],
        sensitivity=[
            LayerSensitivity(layer="stem", snr_db=21.5, kept_float=True),
            LayerSensitivity(layer="head", snr_db=44.0, kept_float=False),
        ],
        recovery=[RecoveryPoint(epoch=e, loss=1.0 / e, score=0.9 + e / 100) for e in (1, 2, 3)],
        stages=[
            Stage(name="calibrate", seconds=8.4, cached=True, why="same data"),
            Stage(name="recover", seconds=131.3, cached=False, why="the pruned model changed"),
        ],
    )


def unmeasured() -> Report:
    rungs = [replace(one, accuracy=UNJUDGED) for one in phone_rungs()[:3]]
    return report(manifest=manifest(rungs=rungs, shipped_rung="dense-int8"))


def single() -> Report:
    only = rung("dense-float", 900, accuracy(0.9, 0.0, 0.0, 0.0), latency(1.0, PHONE))
    return report(
        manifest=manifest(rungs=[only], shipped_rung="dense-float", chosen_by="device", budget=[]),
        runner_up=None,
    )


def nothing_passed() -> Report:
    rungs = [replace(one, dropped="parity 3.0 dB, 15 dB owed") for one in phone_rungs()[1:]]
    return report(manifest=manifest(rungs=rungs, shipped_rung=""), runner_up=None)


def hostile() -> Report:
    name = "<script>alert(1)</script>\"'&\u202e[red]\x1b[2J " + "長い名前🦆" * 40
    rungs = [replace(one, name=f"{name}/{one.name}", latency=UNTIMED) for one in phone_rungs()]
    shown = manifest(
        model=name, target=name, rungs=rungs, shipped_rung=f"{name}/pruned-int8", warnings=[name]
    )
    layers = [LayerWidths(layer=name, kind=name, before=0, after=0)]
    return report(
        manifest=shown,
        widths=layers,
        sensitivity=[LayerSensitivity(layer=name, snr_db=float("inf"), kept_float=True)],
    )


KINDS = {
    "phone": report,
    "detailed": detailed,
    "unmeasured": unmeasured,
    "single": single,
    "nothing passed": nothing_passed,
    "hostile": hostile,
}


class Page(HTMLParser):
    """Reads a page, refuses tags that do not nest, and keeps its text and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def printed(shown: Report, *, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_summary(Console(file=stream, width=width), shown, Path("build/digits/galaxy-s22"))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_well_formed_and_loads_nothing(kind: str) -> None:
    text = render_report(KINDS[kind]())
    page = Page(text)
    loading = {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
        "base",
        "form",
        "image",
        "use",
    }
    assert loading.isdisjoint(name for name, _ in page.elements)
    for name, attributes in page.elements:
        assert {"src", "href", "xlink:href", "srcset", "action", "style"}.isdisjoint(attributes), name
        assert not any(attribute.startswith("on") for attribute in attributes)
    assert not re.search(r"url\(|@import|https?:|//", text)
    assert "nan" not in re.findall(r'[xyr12]+="([^"]*)"', text)


@pytest.mark.parametrize("kind", KINDS)
def test_same_report_gives_the_same_page(kind: str) -> None:
    assert render_report(KINDS[kind]()) == render_report(KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_tables_are_described_in_words(kind: str) -> None:
    text = render_report(KINDS[kind]())
    assert text.count('<svg role="img"') == text.count("<desc>")
    assert Page(text).count("table") == Page(text).count("caption")


def test_hostile_names_stay_text() -> None:
    page = Page(render_report(hostile()))
    assert page.count("script") == 0
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text


def test_phone_build_is_headed_as_chosen_by_host_proxy_with_its_runner_up_and_command() -> None:
    page = Page(render_report(report()))
    assert page.text.index("Chosen by host proxy") < page.text.index("digits on galaxy-s22", 40)
    assert "The runner-up is dense-int8" in page.text
    assert COMMAND in page.text
    assert "No measurement settles latency_ms 8 ms" in page.text


def test_lossy_rung_without_accuracy_heads_the_notices() -> None:
    first = notices(unmeasured())[0]
    assert (first.severity, first.title) == ("alarm", "Lossy, and accuracy unmeasured")
    assert "no [evaluate] in deploy.toml" in first.text
    assert "accuracy unmeasured" in headline(unmeasured())


def test_dense_float_without_accuracy_is_no_alarm() -> None:
    bare = rung("dense-float", 900, UNJUDGED, latency(1.0))
    shown = report(manifest=manifest(rungs=[bare], shipped_rung="dense-float", budget=[]))
    assert all(notice.severity != "alarm" for notice in notices(shown))


def test_without_report_data_the_figure_is_said_to_have_chosen() -> None:
    assert any("also used to choose" in notice.text for notice in notices(report()))
    fresh = report(report_accuracy=accuracy(0.9, 0.01, 0.0, 0.02))
    texts = [notice.text for notice in notices(fresh)]
    assert not any("also used to choose" in text for text in texts)
    assert any("touched once by the shipped rung: accuracy 90.00%" in text for text in texts)


def test_nothing_passed_is_said_with_the_reason_of_each_rung() -> None:
    page = Page(render_report(nothing_passed()))
    assert "No rung ships" in page.text
    assert page.text.count("parity 3.0 dB, 15 dB owed") >= 4
    assert notices(nothing_passed())[0].title == "No rung passed"


def test_a_kept_rung_that_did_not_pass_is_not_said_to_ship() -> None:
    rungs = [replace(one, dropped="4% beyond max_drop") for one in phone_rungs()]
    shown = report(manifest=manifest(rungs=rungs))
    assert "pruned-int8 is kept, but did not pass" in headline(shown)


def test_missed_budget_is_an_alarm_with_both_numbers() -> None:
    line = BudgetLine(name="size_mb", limit=0.1, value=0.196, verdict="missed")
    first = notices(report(manifest=manifest(budget=[line])))[0]
    assert (first.severity, first.text) == ("alarm", "size_mb 0.1 MB was asked, 0.196 MB found")


def test_uncertain_accuracy_tells_how_many_samples_would_settle_it() -> None:
    rungs = phone_rungs()
    judged = replace(rungs[-1].accuracy, verdict="uncertain", reason="1,310 samples would settle it")
    shown = report(manifest=manifest(rungs=[*rungs[:-1], replace(rungs[-1], accuracy=judged)]))
    assert "1,310 samples would settle it" in Page(render_report(shown)).text


def test_speed_up_is_claimed_only_on_one_machine_with_intervals_apart() -> None:
    assert "3.14× faster than dense-float" in Page(render_report(report())).text
    rungs = phone_rungs()
    moved = report(manifest=manifest(rungs=[replace(rungs[0], latency=latency(1.92, PHONE)), *rungs[1:]]))
    text = Page(render_report(moved)).text
    assert "faster than dense-float" not in text
    assert "measured on different machines" in text


def test_estimates_are_never_called_measurements() -> None:
    model = Machine(kind="estimate", name="galaxy-s22 profile", cpu="roofline")
    rungs = [replace(one, latency=replace(one.latency, measured_on=model)) for one in phone_rungs()]
    shown = report(manifest=manifest(rungs=rungs, chosen_by="estimate"))
    text = Page(render_report(shown)).text + printed(shown)
    assert "Chosen by estimate" in text
    assert "estimated for galaxy-s22 profile" in text
    assert "measured on" not in text


def test_rungs_of_another_machine_are_left_off_the_picture_and_counted() -> None:
    rungs = phone_rungs()
    shown = report(manifest=manifest(rungs=[replace(rungs[0], latency=latency(9, PHONE)), *rungs[1:]]))
    assert "1 of 5 not drawn" in Page(render_report(shown)).text


def test_picture_of_the_choice_rings_the_shipped_rung_and_hollows_the_dropped() -> None:
    drawn = charts.trade(report(), {one.name: i for i, one in enumerate(phone_rungs(), 1)})
    assert drawn is not None
    assert drawn.count('class="ring"') == 1
    assert drawn.count('class="dot dropped"') == 1
    assert drawn.count('class="whisker"') == 2 * len(phone_rungs())


def test_accuracy_whiskers_follow_the_paired_interval_of_the_drop() -> None:
    # dense 0.915; drop in [0.001, 0.009] puts the accuracy in [0.906, 0.914]
    low, high = charts._accuracy_ends(phone_rungs()[-1], 1)
    assert (low, high) == pytest.approx((0.906, 0.914))


def test_sizes_fall_from_dense_float_by_way_of_the_pruned_rung() -> None:
    assert [one.name for one in charts.size_path(report())] == ["dense-float", "pruned-float", "pruned-int8"]
    assert [one.name for one in charts.size_path(unmeasured())] == ["dense-float", "dense-int8"]
    assert charts.size_path(single()) == []


def test_sections_without_data_are_absent() -> None:
    bare, full = Page(render_report(single())).text, Page(render_report(detailed())).text
    for title in ("Sensitivity", "Recovery", "Pruning", "Stages", "Not delegated"):
        assert title not in bare
        assert title in full


def test_many_layers_are_drawn_in_part_and_listed_in_full() -> None:
    page = Page(render_report(detailed()))
    assert "The 40 layers that lost most of 60." in page.text
    assert all(f"layer{index}.conv" in page.text for index in range(60))


def test_left_outs_and_refusals_name_their_reasons() -> None:
    text = Page(render_report(report())).text
    assert "aten.hardswish stages.2.act no quantized kernel" in text
    assert "2:4 no kernel skips these zeros channels" in text


def test_unmeasured_latency_says_why_instead_of_drawing() -> None:
    rungs = [replace(one, latency=UNTIMED) for one in phone_rungs()]
    text = Page(render_report(report(manifest=manifest(rungs=rungs)))).text
    assert "No latency was measured: this machine cannot run it." in text


@pytest.mark.parametrize("kind", KINDS)
def test_summary_fits_eighty_columns_and_ends_with_the_path(kind: str) -> None:
    lines = printed(KINDS[kind]()).rstrip("\n").split("\n")
    assert lines[-1] == str(Path("build/digits/galaxy-s22/report.html"))
    unwrapped = {COMMAND, lines[-1]}
    # A wide letter takes two columns, so letters alone never exceed the width either.
    assert all(len(line.rstrip()) <= 80 for line in lines if line.strip() not in unwrapped)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_summary_survives_a_terminal_that_knows_only_ascii(kind: str) -> None:
    assert printed(KINDS[kind](), encoding="ascii").isascii()


def test_summary_marks_the_shipped_rung_and_says_why_others_were_dropped() -> None:
    text = " ".join(printed(report()).split())
    assert "* pruned-int8 196 kB 90.80% 0.70 [0.10, 0.90] 0.612 [0.594, 0.630]" in text
    assert "dense-int8-dynamic dropped: 1.05× slower than dense-float: the step did not pay" in text
    assert "chosen by host proxy" in text
    assert COMMAND in text


def test_summary_names_the_folder_where_a_command_needs_it() -> None:
    assert "deploy validate build/digits/galaxy-s22 --device DEVICE" in printed(
        report(manifest=manifest(budget=[]))
    )


def test_very_long_path_is_not_broken_over_lines() -> None:
    stream = io.StringIO()
    folder = Path("/".join(["a-long-folder-name"] * 12))
    print_summary(Console(file=stream, width=40), report(), folder)
    assert stream.getvalue().rstrip("\n").split("\n")[-1] == str(folder / "report.html")


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (196_032, "196 kB"),
        (999_600, "1.00 MB"),
        (4_212_000, "4.21 MB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(size_bytes: float, shown: str) -> None:
    assert units.size(size_bytes) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0345, "0.0345 ms"),
        (1.0, "1.00 ms"),
        (9.996, "10.0 ms"),
        (12.34, "12.3 ms"),
        (1234.5, "1230 ms"),
        (0.0, "0 ms"),
    ],
)
def test_milliseconds_have_three_significant_digits(value: float, shown: str) -> None:
    assert units.milliseconds(value) == shown


def test_drops_are_in_points_for_fractions_and_in_the_metrics_unit_otherwise() -> None:
    assert units.drop("accuracy", 0.0123) == "1.23 points"
    assert units.drop("accuracy", -0.002) == "\u22120.20 points"
    assert units.drop("accuracy", -0.00001) == "0.00 points"
    assert units.drop("perplexity", 0.123) == "0.123"


def test_importing_the_page_and_the_comparison_costs_neither_rich_nor_torch_nor_numpy() -> None:
    code = (
        "import sys, deploy.reporting.html, deploy.reporting.comparison;"
        "print([name for name in ('torch', 'rich', 'numpy', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
