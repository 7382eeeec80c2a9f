"""`deploy build`: the plan carried out, the rungs judged, and one of them published."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy import ladder, publish
from deploy.cache import Cache
from deploy.disk import locked
from deploy.environment import versions
from deploy.lockfile import lock_toml
from deploy.manifest import (
    Manifest,
    Report,
    Rung,
    encode,
)
from deploy.pipeline import Pipeline, RungResult, accuracy_fails
from deploy.planner import Plan
from deploy.recording import (
    accuracy_record,
    artifact_names,
    budget_lines,
    label_files,
    manifest_record,
    rung_record,
)
from deploy.workbench import Workbench
from exporters.base import EXPORTERS, require_packages
from exporters.cache_root import cache_root
from targets.errors import (
    BudgetError,
    DeployError,
    MissingRequirementError,
    ModelError,
    UsageError,
    WrongOutputsError,
)

Announce = Callable[[str], None]
BUILDABLE = ("dense", "structured", "unstructured")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a person may ask of a build beside deploy.toml."""

    output_dir: Path = Path("build")
    seed: int = 0
    keep_rungs: bool = False
    require_delegated: bool = False
    require_measured: bool = False
    use_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A finished build: where it lies, its report, and the error that marks it (a missed budget)."""

    folder: Path
    report: Report
    marked: DeployError | None = None

    @property
    def manifest(self) -> Manifest:
        """What the build ships."""
        return self.report.manifest

    def __repr__(self) -> str:
        from deploy.reporting.notebook import build_text

        return build_text(self.report, self.folder)

    def _repr_html_(self) -> str:
        from deploy.reporting.notebook import build_html

        return build_html(self.report, self.folder)


def run_build(plan: Plan, options: BuildOptions, announce: Announce = lambda text: None) -> Build:
    """Carries out a plan and publishes the result in `<output-dir>/<model>/<target>/`.

    Raises a DeployError and leaves the last good build as it was when nothing may ship.
    """
    require_buildable(plan)
    _require_label_files(plan)
    folder = options.output_dir / plan.project.name / plan.target.name
    with locked(folder, lambda: announce(f"another build writes {folder}; waiting for it")):
        bench = Workbench(
            plan=plan,
            cache=Cache(cache_root()),
            seed=options.seed,
            refresh=not options.use_cache,
            announce=announce,
        )
        with contextlib.closing(Pipeline(bench)) as pipeline:
            rungs = pipeline.rungs()
            report, shipped = _decide(plan, pipeline, rungs, options, folder)
        files = _files(plan, report, shipped, rungs, options)
        publish.publish(folder, files, encode(report.manifest))
    return Build(folder=folder, report=report, marked=_mark(report.manifest, options))


def require_buildable(plan: Plan) -> None:
    """Raises MissingRequirementError when this version or machine lacks what the plan needs."""
    if plan.runtime.name not in EXPORTERS:
        raise MissingRequirementError(
            f"{plan.target.title} cannot be built for yet",
            found=f"no exporter for {plan.runtime.name}",
            expected=f"one of {', '.join(EXPORTERS)}",
            fix="deploy plan shows what will be done; choose a target that runs one of these, or --runtime",
        )
    if plan.pattern not in BUILDABLE:
        raise MissingRequirementError(
            f"the pattern {plan.pattern} cannot be built yet",
            found="a pattern of masks that this version does not make",
            expected=", ".join(BUILDABLE),
            fix="use --pattern structured",
        )
    for runtime in plan.runtimes:
        require_packages(runtime.name)


def _require_label_files(plan: Plan) -> None:
    """Labels are needed last; a missing file is told first."""
    for output, table in plan.project.tables.outputs.items():
        if table.labels is not None and not plan.project.path(table.labels).is_file():
            raise UsageError(
                f"the labels {table.labels} of output {output} are missing",
                found=f"no file at {plan.project.path(table.labels)}",
                expected="a text file with one label a line",
                fix=f"correct [outputs.{output}] labels, or remove it",
            )


def _decide(
    plan: Plan, pipeline: Pipeline, results: list[RungResult], options: BuildOptions, folder: Path
) -> tuple[Report, RungResult]:
    """The report with the shipped rung chosen. Raises when none may ship."""
    rungs = [_demanded(rung_record(pipeline, result), options) for result in results]
    candidates = [_candidate(plan, rung, result) for rung, result in zip(rungs, results, strict=True)]
    choice = ladder.choose(candidates, by_size=plan.objective == "size")
    if choice is None:
        raise _nothing_ships(plan, results, candidates)
    shipped = next(result for result in results if result.plan.name == choice.name)
    marked = [
        _with_reason(rung, candidate, choice) for rung, candidate in zip(rungs, candidates, strict=True)
    ]
    manifest = manifest_record(pipeline, shipped, marked, folder)
    assert shipped.artifact is not None
    report_drop = pipeline.judging.report_drop(shipped.artifact)
    pattern = shipped.plan.pattern if shipped.plan.pruned else plan.pattern
    pruned = pipeline.variants.pruned(pattern)
    report = Report(
        manifest=manifest,
        plan=plan.record(),
        widths=pruned.widths if pruned else [],
        masks=pruned.masks if pruned else [],
        pruning=pruned.asked if pruned else [],
        recovery=pipeline.variants.recovery(pattern),
        sensitivity=pipeline.artifacts.sensitivity(shipped.plan),
        runner_up=choice.runner_up,
        report_accuracy=accuracy_record(plan, report_drop) if report_drop else None,
        stages=pipeline.bench.stages,
    )
    return report, shipped


def _demanded(rung: Rung, options: BuildOptions) -> Rung:
    """The rung, dropped where a flag demands what it lacks."""
    left = rung.delegation.left if rung.delegation else []
    if not (options.require_delegated and left and rung.dropped is None):
        return rung
    where = f"{left[0].operator} in {left[0].module or 'the model'}"
    return msgspec.structs.replace(rung, dropped=f"--require-delegated: {where} stays outside: {left[0].why}")


def _candidate(plan: Plan, rung: Rung, result: RungResult) -> ladder.Candidate:
    median_ms, interval = _cost_ms(rung)
    return ladder.Candidate(
        name=rung.name,
        size_bytes=rung.size_bytes or 0,
        median_ms=median_ms,
        interval=interval,
        fails=rung.dropped or accuracy_fails(plan, result),
        over_budget=_over_budget(plan, rung),
    )


def _cost_ms(rung: Rung) -> tuple[float, tuple[float, float]]:
    """What is compared: milliseconds of a call, or of a sample where samples a second were measured."""
    if rate := rung.throughput:
        low, high = rate.ci95
        return 1000 / rate.samples_per_s, (1000 / high, 1000 / low)
    latency = rung.latency
    if latency.median_ms is None or not latency.ci95_ms:
        return float("inf"), (float("inf"), float("inf"))
    return latency.median_ms, (latency.ci95_ms[0], latency.ci95_ms[1])


def _over_budget(plan: Plan, rung: Rung) -> str | None:
    """The first limit that this rung's measured figures break, where the measurement can settle it."""
    for line in budget_lines(plan, rung, None):
        if line.verdict == "missed" and line.name != "max_drop":
            return f"{line.name} is {line.value:.4g}, {line.limit:g} is allowed"
    return None


def _nothing_ships(plan: Plan, results: list[RungResult], candidates: list[ladder.Candidate]) -> DeployError:
    evaluate = plan.project.tables.evaluate
    metric = evaluate.metric if evaluate else "accuracy"
    kind = ModelError if all(result.artifact is None for result in results) else WrongOutputsError
    return kind(
        "no rung may ship",
        found="; ".join(f"{candidate.name}: {candidate.fails}" for candidate in candidates),
        expected=f"outputs that agree, and {metric} within its limit",
        fix="raise max_drop, lower [prune] sparsity, add [recover] data, or use --precision float32",
    )


def _with_reason(rung: Rung, candidate: ladder.Candidate, choice: ladder.Choice) -> Rung:
    if rung.name == choice.name:
        return msgspec.structs.replace(rung, reason=choice.reason)
    if why := candidate.fails or candidate.over_budget:
        return msgspec.structs.replace(rung, reason=why, dropped=why)
    return msgspec.structs.replace(rung, reason=f"{choice.name} is preferred: {choice.reason}")


def _files(
    plan: Plan, report: Report, shipped: RungResult, rungs: list[RungResult], options: BuildOptions
) -> dict[str, Path | bytes]:
    from deploy.reporting.html import render_report

    assert shipped.golden is not None
    assert shipped.artifact is not None
    files: dict[str, Path | bytes] = {**artifact_names(shipped.artifact), **label_files(plan)}
    files |= {file.name: file for file in sorted(shipped.golden.glob("*.npz"))}
    files["plan.json"] = encode(report.plan)
    files["report.json"] = encode(report)
    files["report.html"] = render_report(report).encode()
    files["deploy.lock.toml"] = lock_toml(plan.project, plan, versions(), options.seed)
    if options.keep_rungs:
        for rung in rungs:
            if rung.artifact is not None:
                prefix = f"rungs/{rung.plan.name.replace('/', '-')}"
                files |= artifact_names(rung.artifact, prefix=prefix)
    return files


def _mark(manifest: Manifest, options: BuildOptions) -> DeployError | None:
    """The error that a finished build still ends with: a missed budget, or one that had to be measured."""
    missed = [line for line in manifest.budget if line.verdict == "missed" and line.name != "max_drop"]
    if missed:
        line = missed[0]
        return BudgetError(
            f"{line.name} is missed; the build stays, marked",
            found=f"{line.value:.4g}",
            expected=f"at most {line.limit:g}",
            fix="prune more, choose a smaller model, or raise the budget",
        )
    unmeasured = [line for line in manifest.budget if line.verdict == "unmeasured"]
    rung = next(rung for rung in manifest.rungs if rung.name == manifest.shipped_rung)
    if options.require_measured and (
        unmeasured or rung.accuracy.verdict == "unmeasured" or manifest.chosen_by != "device"
    ):
        names = ", ".join(line.name for line in unmeasured) or "latency on the target"
        return BudgetError(
            f"--require-measured: {names} is unmeasured; the build stays, marked",
            fix=next((line.how for line in unmeasured if line.how), None),
        )
    return None
