"""What a user gains: every rung of a build against the eager float32 model and against dense int8.

    python -m benchmarks.gains [--models digits resnet20] [--settings default small] [--runs N] [-o FOLDER]

Builds each project, then calls eager torch (one thread, batch 1, inference_mode, a process of its own) and
the rungs' programs (one thread, batch 1, a process each) in rounds whose order alternates. Speed-ups are
ratios within a round. Sizes are files: the weights' for the eager model, the program's for a rung.

Settings: `default` is the project's deploy.toml; `small` removes parameters instead of multiply-adds and
ships the smallest rung that keeps accuracy. Projects other than digits come from tests/real/prepare.py and
need EDGE_DEPLOY_DATA.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import deploy
from benchmarks import render
from benchmarks.eager import EagerSession
from benchmarks.measuring import ROOT, deliver, parser, plain, ratios, record, summarise
from deploy.building import Build
from deploy.manifest import Rung
from deploy.project import Project, load
from exporters.remote import RemoteSession

MODELS = ("digits", "ds_cnn", "resnet20", "resnet56")
EAGER = "eager float32"
DENSE_INT8 = "dense-int8"
PRUNED_INT8 = "pruned-int8"
SPEED_GOAL = 3.0
SIZE_GOAL = 6.0
DROP_GOAL = 0.01
WORTH = 1.05
ROUND_S = 0.01
WARM_UP_S = 0.2
WARM_UP_CALLS = 5
MOST_CALLS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a project is built: what is laid over its deploy.toml, and what the build chooses by."""

    changes: Mapping[str, Mapping[str, Any]]
    objective: str


SETTINGS: dict[str, dict[str, Setting]] = {
    "default": dict.fromkeys(MODELS, Setting(changes={}, objective="latency")),
    "small": {
        name: Setting(
            changes={"prune": {"sparsity": sparsity, "of": "parameters"}, "recover": {"epochs": epochs}},
            objective="size",
        )
        for name, (sparsity, epochs) in {
            "digits": (0.5, 12), "ds_cnn": (0.4, 12), "resnet20": (0.5, 8),
        }.items()
    },
}  # fmt: skip


class Timed(Protocol):
    """What can be timed: a RemoteSession, or eager torch."""

    def time(self, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        ...


def prepared(name: str, folder: Path) -> Path:
    """The project's folder; the real ones are written into `folder` first, unless they are there."""
    if name == "digits":
        return ROOT / "examples" / "digits"
    if not (folder / name / f"{name}.safetensors").exists():
        file = ROOT / "tests" / "real" / "prepare.py"
        spec = importlib.util.spec_from_file_location("_prepare", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.prepare(name, folder)
    return folder / name


def built(project: Project, setting: Setting, target: str, output_dir: Path) -> Build:
    """The build with the programs of all its rungs."""
    return deploy.build(
        project.override(setting.changes),
        target=target,
        objective=setting.objective,
        keep_rungs=True,
        output_dir=output_dir,
        announce=lambda text: print(f"{project.name}: {text}", file=sys.stderr),
    )


def programs(build: Build) -> dict[str, Path]:
    """The program of each rung that ran, by the rung's name."""
    names = [rung.name for rung in build.manifest.rungs if rung.latency.median_ms is not None]
    found = {file.stem.rpartition("-")[0]: file for file in (build.folder / "rungs").iterdir()}
    return {name: found[name] for name in names}


def timed(project: Project, build: Build, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call in each round, eager torch and all rungs, on one real sample."""
    specs = {spec.name: spec for spec in project.specs()}
    with np.load(build.folder / "inputs.npz") as arrays:
        sample = {name: arrays[name][:1] for name in specs}
    with ExitStack() as stack:
        sessions: dict[str, Any] = {EAGER: stack.enter_context(EagerSession(project.folder))}
        for name, file in programs(build).items():
            sessions[name] = stack.enter_context(
                RemoteSession(
                    build.manifest.runtime,
                    file,
                    inputs=[specs[each.name] for each in build.manifest.inputs],
                    outputs=[each.name for each in build.manifest.outputs],
                    threads=1,
                )
            )
        for session in sessions.values():
            session.prepare(sample)
        return rounds_of(sessions, rounds)


def rounds_of(sessions: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """The median call of each session in each round, in ms; every other round goes backwards.

    A round is about 10 ms of calls each, after 0.2 s to warm up.
    """
    calls = {name: _calls_a_round(session) for name, session in sessions.items()}
    medians: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds):
        for name in list(sessions)[:: 1 if turn % 2 == 0 else -1]:
            medians[name].append(float(np.median(sessions[name].time(calls[name]))) / 1e6)
    return medians


def _calls_a_round(session: Timed) -> int:
    spent, recent = 0.0, 0.0
    while spent < WARM_UP_S:
        samples = session.time(WARM_UP_CALLS)
        spent += sum(samples) / 1e9
        recent = float(np.median(samples)) / 1e9
    return max(1, min(MOST_CALLS, int(ROUND_S / max(recent, 1e-9))))


def compared(build: Build, times: Mapping[str, Sequence[float]], eager_bytes: int) -> list[dict[str, Any]]:
    """A row for the eager model and one for each rung."""
    manifest = build.manifest
    rungs = {rung.name: rung for rung in manifest.rungs if rung.name in times}
    int8_bytes = rungs[DENSE_INT8].size_bytes if DENSE_INT8 in rungs else None
    dense = next(iter(rungs.values())).accuracy
    eager = {
        "name": EAGER,
        "size_bytes": eager_bytes,
        "latency_ms": plain(summarise(times[EAGER])),
        "accuracy": None if dense.value is None or dense.drop is None else dense.value + dense.drop,
    }
    return [
        eager,
        *(_row(rung, times, eager_bytes, int8_bytes, manifest.shipped_rung) for rung in rungs.values()),
    ]


def _row(
    rung: Rung, times: Mapping[str, Sequence[float]], eager_bytes: int, int8_bytes: int | None, shipped: str
) -> dict[str, Any]:
    assert rung.size_bytes is not None
    row = {
        "name": rung.name,
        "shipped": rung.name == shipped,
        "macs": rung.macs,
        "parameters": rung.parameters,
        "size_bytes": rung.size_bytes,
        "latency_ms": plain(summarise(times[rung.name])),
        "accuracy": rung.accuracy.value,
        "drop": rung.accuracy.drop,
        "drop_ci95": rung.accuracy.drop_ci95,
        "samples": rung.accuracy.samples,
        "faster_than_eager": plain(summarise(ratios(times[EAGER], times[rung.name]))),
        "smaller_than_eager": eager_bytes / rung.size_bytes,
    }
    if int8_bytes is not None:
        row["faster_than_int8"] = plain(summarise(ratios(times[DENSE_INT8], times[rung.name])))
        row["smaller_than_int8"] = int8_bytes / rung.size_bytes
    return row


def goal(row: Mapping[str, Any]) -> dict[str, str]:
    """Each part of the goal for a rung: met, missed, or uncertain where an interval spans the limit."""
    low, high = row["faster_than_eager"]["interval"]
    speed = "met" if low >= SPEED_GOAL else "missed" if high < SPEED_GOAL else "uncertain"
    size = "met" if row["smaller_than_eager"] >= SIZE_GOAL else "missed"
    if row["drop"] is None or row["drop_ci95"] is None:
        return {"speed": speed, "size": size, "accuracy": "unmeasured"}
    least, most = row["drop_ci95"]
    accuracy = "met" if most <= DROP_GOAL else "missed" if least > DROP_GOAL else "uncertain"
    return {"speed": speed, "size": size, "accuracy": accuracy}


def pruning_pays(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What pruning adds to int8, and whether it pays; None where the build has no two int8 rungs.

    It pays where the pruned program is more than 5% smaller, or more than 5% faster by the lower end of the
    interval, and loses at most one point on these samples.
    """
    row = next((each for each in rows if each["name"] == PRUNED_INT8), None)
    if row is None or "faster_than_int8" not in row:
        return None
    gains = row["faster_than_int8"]["interval"][0] > WORTH or row["smaller_than_int8"] > WORTH
    loses = row["drop"] is not None and row["drop"] > DROP_GOAL + 1e-12
    why = "loses more than a point" if loses else "" if gains else "neither faster nor smaller by 5%"
    return {
        "pays": gains and not loses,
        "why": why,
        "faster": row["faster_than_int8"],
        "smaller": row["smaller_than_int8"],
        "drop": row["drop"],
    }


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One entry for each model and setting."""
    return [
        entry(name, setting, arguments, folder)
        for setting in arguments.settings
        for name in arguments.models
        if name in SETTINGS[setting]
    ]


def entry(name: str, setting: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A project built in one setting, its rungs timed and compared."""
    project = load(prepared(name, folder / "projects"))
    chosen = SETTINGS[setting][name]
    build = built(project, chosen, arguments.target, folder / "builds" / setting)
    assert project.tables.model.weights is not None
    eager_bytes = project.path(project.tables.model.weights).stat().st_size
    times = timed(project, build, arguments.runs)
    rows = compared(build, times, eager_bytes)
    shipped = next(row for row in rows if row.get("shipped"))
    return {
        "model": name,
        "setting": setting,
        "changes": {table: dict(keys) for table, keys in chosen.changes.items()},
        "objective": chosen.objective,
        "target": arguments.target,
        "rows": rows,
        "goal": goal(shipped),
        "pruning": pruning_pays(rows),
    }


def options() -> argparse.ArgumentParser:
    """The common options, and which models and settings."""
    made = parser(__doc__, runs=41, least=7)
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    made.add_argument("--target", default="galaxy-s22")
    made.add_argument("--work", type=Path, help="keep prepared projects and builds in here")
    return made


def main(words: list[str] | None = None) -> None:
    """Builds, measures and prints."""
    arguments = options().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.work or Path(scratch)).absolute()
        result = record("gains", {"entries": measure(arguments, folder)})
    deliver(result, render.gains(result), arguments)


if __name__ == "__main__":
    main()
