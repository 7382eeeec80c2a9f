"""Builds the real projects and writes docs/models.md from their manifests.

    python tests/real/report.py FILE FOLDER

FOLDER keeps the prepared projects, their builds and the cache, so that a second run is quick.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.manifest import Manifest, Rung

HERE = Path(__file__).parent
DATA = {
    "resnet20": "CIFAR-10 test pictures; published weights",
    "resnet56": "CIFAR-10 test pictures; published weights",
    "resnet8": "CIFAR-10 test pictures; MLPerf Tiny's weights",
    "ds_cnn": "spoken digits, a speaker that training never heard",
    "minilm": "lines of WikiText-2; agreement with the float model",
    "mobilenet_v2": "none: random weights",
    "resnet18": "none: random weights",
    "cond": "scikit-learn's digits, half of them in the dark; two stems behind torch.cond",
    "scan": "scikit-learn's digits; a recurrent cell in torch's scan",
    "lstm": "scikit-learn's digits",
    "dict_output": "scikit-learn's digits; a dictionary of two answers",
}
HEADER = """# Real models

Each of the projects in `tests/real/projects`, built by `deploy build --target galaxy-s22`. This page is
written by `make models` from the manifests of such builds; do not edit it. `make test-real` checks what it
claims.
"""
LEGEND = """
- Size is the program's file. Accuracy is the metric on the evaluation data, in percent (for minilm the mean
  cosine between a sentence's embedding and the float model's). Latency is the median of one call with a batch
  of one and its 95% interval; a wide one means that the machine was busy with other work, too.
- Drop is in points against the dense float module on the same samples, with its paired 95% interval.
- Delegated: operators that run in XNNPACK, of all operators of the shipped program.
- The evaluation data also chose among the rungs. The CIFAR networks have seen the training pictures that
  calibrate and recover them, and none of the pictures that judge.
- Where the weights are random nothing is known about quality: only that the export computes what the module
  does, its size and its time. `unmeasured` says so.
"""
COLUMNS = ["model", "evaluated on", "dense float", "dense int8", "shipped", "drop", "delegated"]


def main(page: Path, folder: Path) -> None:
    """Writes the page; projects whose data are absent get a line that says so."""
    preparation, building = _load("prepare"), _load("builds")
    manifests, absent = {}, {}
    for name in DATA:
        try:
            work = preparation.prepare(name, folder)
        except preparation.NotObtainableError as reason:
            absent[name] = str(reason)
            continue
        built = building.build(work, folder / "cache")
        if built.code:
            raise SystemExit(f"{name}: exit {built.code}: {built.stderr or built.stdout}")
        manifests[name] = built.manifest
        print(f"{name}: {built.manifest.shipped_rung}", file=sys.stderr)
    page.write_text(render(manifests, absent), encoding="utf-8")


def render(manifests: dict[str, Manifest], absent: dict[str, str]) -> str:
    """The page's text."""
    lines = [HEADER]
    if manifests:
        lines.append(_machine(next(iter(manifests.values()))))
    lines += ["", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
    lines += [_row(_cells(name, manifest)) for name, manifest in manifests.items()]
    lines += [f"\nNot built: {name}: {reason}" for name, reason in absent.items()]
    lines += [LEGEND, "## Rungs that were dropped\n"]
    lines += [f"- {name}: {rung.name}: {short(rung.dropped)}" for name, rung in _dropped(manifests)]
    lines += ["", "## Rungs that passed and lost\n"]
    lines += [f"- {name}: {_lost(rung)}" for name, rung in _losers(manifests)]
    return "\n".join(lines) + "\n"


def short(reason: str) -> str:
    """A reason up to its first semicolon: the rest says where in the model."""
    return reason.partition(";")[0].rstrip(".")


def _machine(manifest: Manifest) -> str:
    versions = ", ".join(
        f"{name} {manifest.environment.packages[name]}"
        for name in ("torch", "executorch", "torchao", "torch-pruning")
        if name in manifest.environment.packages
    )
    system = manifest.environment.os.partition("-")[0]
    return (
        f"Measured in {manifest.created_at[:7]} on {manifest.environment.cpu}, {system}, "
        f"Python {manifest.environment.python}, {versions}, {_threads(manifest.recommended.threads)}.\n"
        "**The latencies are this machine's, not a phone's**: the rungs were chosen by host proxy, and "
        "`deploy validate`\nwith a phone attached would measure them there."
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _cells(name: str, manifest: Manifest) -> list[str]:
    rungs = {rung.name: rung for rung in manifest.rungs}
    shipped = rungs[manifest.shipped_rung]
    return [
        name,
        DATA[name] + (f" ({shipped.accuracy.samples})" if shipped.accuracy.samples else ""),
        _figures(rungs["dense-float"]),
        _figures(rungs.get("dense-int8") or rungs["dense-int8-dynamic"]),
        f"**{shipped.name}**: {_figures(shipped)}",
        _drop(shipped),
        _delegated(shipped),
    ]


def _figures(rung: Rung) -> str:
    if rung.size_bytes is None:
        return "dropped"
    parts = [_size(rung.size_bytes)]
    if rung.accuracy.value is not None:
        parts.append(f"{100 * rung.accuracy.value:.1f}%")
    if rung.latency.median_ms is not None and rung.latency.ci95_ms is not None:
        low, high = rung.latency.ci95_ms
        parts.append(f"{_ms(rung.latency.median_ms)} ms [{_ms(low)}, {_ms(high)}]")
    return ", ".join(parts) + (", dropped" if rung.dropped else "")


def _drop(rung: Rung) -> str:
    accuracy = rung.accuracy
    if accuracy.drop is None or accuracy.drop_ci95 is None:
        return accuracy.verdict
    low, high = accuracy.drop_ci95
    return f"{100 * accuracy.drop:.2f} [{100 * low:.2f}, {100 * high:.2f}], {accuracy.verdict}"


def _delegated(rung: Rung) -> str:
    return f"{rung.delegation.delegated} of {rung.delegation.operators}" if rung.delegation else ""


def _dropped(manifests: dict[str, Manifest]) -> Iterator[tuple[str, Any]]:
    for name, manifest in manifests.items():
        yield from ((name, rung) for rung in manifest.rungs if rung.dropped)


def _losers(manifests: dict[str, Manifest]) -> Iterator[tuple[str, Rung]]:
    for name, manifest in manifests.items():
        for rung in manifest.rungs:
            if not rung.dropped and rung.name not in ("dense-float", "dense-int8", manifest.shipped_rung):
                yield name, rung


def _lost(rung: Rung) -> str:
    return f"{rung.name}: {_figures(rung)}, drop {_drop(rung)}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def _ms(value: float) -> str:
    return f"{value:.3g}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_real_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
