"""The tables of docs/performance.md, made from the recorded results.

    python -m benchmarks.render [FOLDER] [--check]

Reads FOLDER/NAME.json (default: benchmarks/results) and writes each table between its markers,
`<!-- NAME -->` and `<!-- /NAME -->`. With --check nothing is written and a stale page exits 1.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

Result = Mapping[str, Any]


def start_up(result: Result) -> str:
    """CPU seconds of the commands."""
    rows = [
        (
            f"`{row['name']}`" if "," not in row["name"] else f"`{row['name'].split(',')[0]}`, fully cached",
            _spread(row["cpu_s"], 3),
            f"{row['cpu_s']['smallest']:.3f} to {row['cpu_s']['largest']:.3f}",
            f"{row['limit_s']:g}",
            "met" if row["cpu_s"]["interval"][1] < row["limit_s"] else "missed",
        )
        for row in result["rows"]
    ]
    heads = ("command", "CPU s, median [95%]", "all runs", "less than", "goal")
    return _origin(result, f"{result['rows'][0]['cpu_s']['runs']} interleaved runs") + _table(heads, rows)


def overhead(result: Result) -> str:
    """Ratios of a build to the bare script."""
    limits = result["limits"]
    cpu, memory = limits["cpu"], limits["memory"]
    rows = [
        _ratio("CPU time, latency sampling apart", result["cpu_ratio"], cpu),
        _ratio("CPU time, all of it", result["cpu_ratio_with_sampling"], None),
        _ratio("peak memory of the largest process", result["memory_ratio"], memory),
        _ratio("peak memory of all processes at once, sampled", result["tree_memory_ratio"], None),
    ]
    took = "\n".join(
        [
            "",
            f"CPU seconds: build {_spread(result['cpu_s']['build'], 1)}, of which "
            f"{result['sampling_s']['median']:.1f} call the rungs only to time them; "
            f"script {_spread(result['cpu_s']['bare'], 1)}. Largest process: build "
            f"{result['peak_bytes']['build']['median'] / 1e6:.0f} MB, script "
            f"{result['peak_bytes']['bare']['median'] / 1e6:.0f} MB.",
            "",
            "Wall seconds of the build's stages, medians: "
            + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["stages"].items())
            + ".",
            "",
        ]
    )
    heads = ("build / script", "median [95%]", "all pairs", "at most", "goal")
    return _origin(result, f"{result['cpu_ratio']['runs']} interleaved pairs") + _table(heads, rows) + took


def gains(result: Result) -> str:
    """What each rung is against eager float32, the verdicts, and whether pruning pays."""
    entries = result["entries"]
    rounds = entries[0]["rows"][0]["latency_ms"]["runs"]
    text = _origin(result, f"{rounds} rounds of about 10 ms each, in alternating order")
    for setting in dict.fromkeys(entry["setting"] for entry in entries):
        chosen = [entry for entry in entries if entry["setting"] == setting]
        text += f"### {SETTING_TITLES[setting]}\n\n"
        if any(entry["changes"] for entry in chosen):
            text += "".join(f"- {entry['model']}: {_changes(entry)}\n" for entry in chosen) + "\n"
        text += _table(GAIN_HEADS, [row for entry in chosen for row in _gain_rows(entry)]) + "\n"
    text += "### Against the goal\n\n" + _table(GOAL_HEADS, [_goal_row(entry) for entry in entries])
    judged = [entry for entry in entries if entry["pruning"]]
    if judged:
        text += "\n### What pruning adds to int8\n\n"
        text += _table(PRUNING_HEADS, [_pruning_row(entry) for entry in judged])
    return text


SETTING_TITLES = {
    "default": "As deploy.toml stands: multiply-adds removed, the fastest rung ships",
    "small": "For size: parameters removed, the smallest rung ships",
}
GAIN_HEADS = (
    "model", "rung", "size", "ms [95%]", "accuracy", "drop, points [95%]", "against eager: faster [95%]",
    "smaller", "against dense int8: faster [95%]", "smaller",
)  # fmt: skip
GOAL_HEADS = ("model", "setting", "ships", "3x faster", "6x smaller", "within 1 point")
PRUNING_HEADS = ("model", "setting", "faster [95%]", "smaller", "points lost", "pays")


def _gain_rows(entry: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for row in entry["rows"]:
        ours = "drop" in row
        yield (
            entry["model"],
            f"**{row['name']}**" if row.get("shipped") else row["name"],
            f"{row['size_bytes'] / 1e3:.0f} kB",
            _spread(row["latency_ms"], 4),
            "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}%",
            _points(row) if ours else "",
            _spread(row["faster_than_eager"], 2) if ours else "",
            f"{row['smaller_than_eager']:.2f}" if ours else "",
            _spread(row["faster_than_int8"], 2) if "faster_than_int8" in row else "",
            f"{row['smaller_than_int8']:.2f}" if "faster_than_int8" in row else "",
        )


def _goal_row(entry: Mapping[str, Any]) -> Sequence[str]:
    shipped = next(row for row in entry["rows"] if row.get("shipped"))
    found = entry["goal"]
    return (
        entry["model"],
        entry["setting"],
        shipped["name"],
        f"{found['speed']} ({shipped['faster_than_eager']['median']:.1f}x)",
        f"{found['size']} ({shipped['smaller_than_eager']:.1f}x)",
        f"{found['accuracy']} ({_points(shipped)})",
    )


def _pruning_row(entry: Mapping[str, Any]) -> Sequence[str]:
    found = entry["pruning"]
    return (
        entry["model"],
        entry["setting"],
        _spread(found["faster"], 2),
        f"{found['smaller']:.2f}",
        "unmeasured" if found["drop"] is None else _signed(100 * found["drop"]),
        "yes" if found["pays"] else f"no: {found['why']}",
    )


def _changes(entry: Mapping[str, Any]) -> str:
    pairs = [
        f"[{table}] {key} = {value}"
        for table, keys in entry["changes"].items()
        for key, value in keys.items()
    ]
    return ", ".join(pairs)


def _ratio(name: str, summary: Mapping[str, Any], limit: float | None) -> Sequence[str]:
    low, high = summary["interval"]
    verdict = "" if limit is None else "met" if high <= limit else "missed" if low > limit else "uncertain"
    return (
        name,
        _spread(summary, 2),
        f"{summary['smallest']:.2f} to {summary['largest']:.2f}",
        "" if limit is None else f"{limit:g}",
        verdict,
    )


def _points(row: Mapping[str, Any]) -> str:
    if row["drop"] is None:
        return "unmeasured"
    text = _signed(100 * row["drop"])
    if row["drop_ci95"] is None:
        return text
    return f"{text} [{', '.join(_signed(100 * end) for end in row['drop_ci95'])}]"


def _signed(points: float) -> str:
    return f"{points + 0.0:.2f}"


def _spread(summary: Mapping[str, Any], digits: int) -> str:
    low, high = summary["interval"]
    return f"{summary['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _origin(result: Result, how: str) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return (
        f"`{result['command']}`, {result['date']}; {how}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['os']}, load {machine['load']:.1f} at the end; Python {machine['python']}, {versions}.\n\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quick_starts(result: Result) -> str:
    """What a host build ships against the libraries' own quick starts."""
    entries = result["entries"]
    rows = [
        (
            entry["model"],
            f"**{row['name']}**" if row["name"] == "deploy build" else row["name"],
            _spread(row["latency_ms"], 4),
            "" if row["drop"] is None else f"{100 * row['drop']:.2f}",
            "" if row["snr_db"] is None else f"{row['snr_db']:.0f}",
            f"{row['faster_than_eager']['median']:.2f}",
        )
        for entry in entries
        for row in entry["rows"]
    ]
    verdicts = [
        (
            entry["model"],
            entry["ships"],
            entry["best"],
            _spread(entry["against_best"], 2),
            "no" if entry["against_best"]["interval"][1] >= 1 else "yes",
            "" if entry.get("search_share") is None else f"{entry['search_share']:.0%}",
        )
        for entry in entries
    ]
    failed = [
        f"- {entry['model']}: {name}: `{why}`" for entry in entries for name, why in entry["failed"].items()
    ]
    rounds = entries[0]["rows"][0]["latency_ms"]["runs"]
    text = _origin(result, f"{rounds} rounds of about 10 ms each, in alternating order")
    text += _table(("model", "recipe", "ms [95%]", "points lost", "dB", "faster than eager"), rows)
    text += "\n### Against the best quick start\n\n"
    text += _table(
        (
            "model",
            "ships",
            "best quick start",
            "times as fast [95%]",
            "slower beyond noise",
            "timing's part of the build",
        ),
        verdicts,
    )
    text += f"\nGeometric mean {result['geometric_mean']:.2f}; the goal is {result['goal']:g}.\n"
    return text + ("\nQuick starts that failed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def server(result: Result) -> str:
    """What a request costs the server beyond the model."""
    rows = [
        (
            str(row["concurrency"]),
            _spread(row["over_us"], 0),
            f"{result['limit_us']:g}",
            "met" if row["over_us"]["interval"][1] <= result["limit_us"] else "missed",
            _spread(row["per_second"], 0),
        )
        for row in result["rows"]
    ]
    heads = ("at once", "us over the raw call, median [95%]", "at most", "goal", "requests a second")
    runs = result["rows"][0]["over_us"]["runs"]
    text = _origin(result, f"{runs} interleaved rounds of {result['requests']} requests")
    text += _table(heads, rows) + f"\nThe raw call: {_spread(result['raw_us'], 0)} us.\n"
    cost = result.get("per_million")
    return text + (f"A million answers at the best rate cost {cost:.4f}.\n" if cost is not None else "")


def soak(result: Result) -> str:
    """What came of twice the load that the server can carry."""
    before, after = result["memory_mb"]
    rows = [
        ("requests a second that it can answer", f"{result['capacity']:.0f}"),
        *((f"answers with {status}", str(count)) for status, count in result["statuses"].items()),
        ("wrong answers", str(result["wrong"])),
        (
            "median and 99% of those answered, ms from sending",
            f"{result['p50_ms']:.1f}, {result['p99_ms']:.1f}",
        ),
        ("memory before and after, MB", f"{before:.0f}, {after:.0f}"),
        ("no wrong answer, no other status, memory bounded", "met" if result["met"] else "missed"),
    ]
    return _origin(result, f"{result['seconds']:g} s at twice the rate") + _table(("", ""), rows)


def sparse(result: Result) -> str:
    """ResNet-50 with zeros that are skipped, and products with zeros that are not."""
    rows = [
        (
            row["name"],
            str(row["batch"]),
            _spread(row["latency_ms"], 1),
            _spread(row["gain"], 2),
            "" if row["goal"] is None else f"{row['goal']:g}",
            "" if row["goal"] is None else _reached(row["gain"], row["goal"]),
        )
        for row in result["rows"]
    ]
    products = [
        (f"{row['zeros']:.0%}", str(row["columns"]), _spread(row["slower"], 2)) for row in result["csr"]
    ]
    rounds, threads = result["rows"][0]["latency_ms"]["runs"], result["threads"]
    text = _origin(result, f"{rounds} rounds in alternating order, threads: {threads}")
    heads = ("ResNet-50", "batch", "ms [95%]", "faster than dense float32 in ONNX Runtime [95%]", "goal", "")
    text += _table(heads, rows) + "\nA weight of 1024 x 1024 as CSR in torch, against the dense product:\n\n"
    return text + _table(("zeros", "columns", "CSR's time over dense [95%]"), products)


def _reached(gain: Mapping[str, Any], goal: float) -> str:
    if gain["median"] >= goal:
        return "met"
    return "missed" if gain["interval"][1] < goal else "missed by the median"


TABLES: dict[str, Callable[[Result], str]] = {
    "start_up": start_up,
    "overhead": overhead,
    "gains": gains,
    "quick_starts": quick_starts,
    "server": server,
    "soak": soak,
    "quick_starts_resnet50": quick_starts,
    "sparse": sparse,
}


def rendered(page: str, results: Mapping[str, Result]) -> str:
    """The page with each table renewed. Raises ValueError where its markers are not there once."""
    for name, result in results.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(opening) != 1 or page.count(closing) != 1:
            raise ValueError(f"the page has not the markers {opening} and {closing} once each")
        before, _, rest = page.partition(opening)
        after = rest.partition(closing)[2]
        table = TABLES[name](result).rstrip("\n")
        page = f"{before}{opening}\n\n{table}\n\n{closing}{after}"
    return page


def read_results(folder: Path) -> dict[str, Result]:
    """The recorded results by benchmark."""
    files = [folder / f"{name}.json" for name in TABLES]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()}


def main(words: list[str] | None = None) -> None:
    """Writes the page, or checks it."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    arguments.add_argument("--check", action="store_true", help="exit 1 where the page is stale")
    given = arguments.parse_args(words)
    page = PAGE.read_text(encoding="utf-8")
    new = rendered(page, read_results(given.folder))
    if given.check:
        sys.exit(int(new != page))
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
