"""`deploy build`: the plan carried out, the rungs judged, and one of them published."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy import ladder, publish
from deploy.cache import Cache, default_root, digest, file_digest
from deploy.environment import environment, this_machine, versions
from deploy.lockfile import lock_toml
from deploy.manifest import (
    Accuracy,
    BudgetLine,
    Delegation,
    File,
    Input,
    Latency,
    LeftOut,
    Manifest,
    Output,
    Provenance,
    Recommended,
    Report,
    Rung,
    Verdict,
    encode,
)
from deploy.pipeline import Pipeline, RungResult, accuracy_fails
from deploy.planner import Plan
from deploy.validation.metrics import Drop
from exporters.base import EXPORTERS, find_exporter
from targets.errors import (
    BudgetError,
    DeployError,
    MissingRequirementError,
    ModelError,
    UsageError,
    WrongOutputsError,
)

DEVICE_OF_KIND = {"phone": "adb", "board": "ssh:USER@HOST", "server": "ssh:USER@HOST", "browser": "browser"}
HASH_LENGTH = 12
BYTES_OF_UNIT = {"size_mb": 1e6, "peak_memory_mb": 1e6}

Announce = Callable[[str], None]


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
    with publish.locked(folder, announce):
        pipeline = Pipeline(
            plan=plan,
            cache=Cache(default_root()),
            seed=options.seed,
            refresh=not options.use_cache,
            announce=announce,
        )
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
    if plan.pattern not in ("dense", "structured"):
        raise MissingRequirementError(
            f"the pattern {plan.pattern} cannot be built yet",
            found="no weight-mask pruning in this version",
            expected="structured or dense",
            fix="use --pattern structured",
        )
    find_exporter(plan.runtime.name)


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
    rungs = [_rung(plan, pipeline, result, options) for result in results]
    candidates = [_candidate(plan, rung, result) for rung, result in zip(rungs, results, strict=True)]
    choice = ladder.choose(candidates, by_size=plan.objective == "size") or _best_over_budget(
        plan, results, candidates
    )
    shipped = next(result for result in results if result.plan.name == choice.name)
    marked = [
        _with_reason(rung, candidate, choice) for rung, candidate in zip(rungs, candidates, strict=True)
    ]
    manifest = _manifest(plan, pipeline, shipped, marked, options, folder)
    report_drop = pipeline.report_drop(shipped)
    pruned = pipeline.pruned()
    report = Report(
        manifest=manifest,
        plan=plan.record(),
        widths=pruned.widths if pruned else [],
        pruning=pruned.asked if pruned else [],
        recovery=pipeline.recovery(),
        sensitivity=pipeline.sensitivity(shipped.plan),
        runner_up=choice.runner_up,
        report_accuracy=_accuracy(plan, report_drop) if report_drop else None,
        stages=pipeline.stages,
    )
    return report, shipped


def _rung(plan: Plan, pipeline: Pipeline, result: RungResult, options: BuildOptions) -> Rung:
    validated, exported = result.validated, result.exported
    dense, cost = pipeline.cost(False), pipeline.cost(result.plan.pruned)
    delegated = exported.delegated if exported else None
    dropped = result.dropped
    if options.require_delegated and delegated and delegated.left and dropped is None:
        left = delegated.left[0]
        dropped = (
            f"--require-delegated: {left.operator} in {left.module or 'the model'} stays outside: {left.why}"
        )
    return Rung(
        name=result.plan.name,
        pattern=plan.pattern if result.plan.pruned else "dense",
        precision=result.plan.precision,
        sparsity=round(1 - cost.macs / dense.macs, 4) if result.plan.pruned and dense.macs else 0.0,
        parameters=cost.parameters,
        macs=cost.macs,
        size_bytes=exported.size_bytes if exported else None,
        accuracy=_accuracy(plan, validated.drop if validated else None),
        parity=validated.parity if validated else None,
        latency=_latency(pipeline, result),
        peak_memory_bytes=validated.peak_memory_bytes if validated else None,
        delegation=Delegation(
            delegate=delegated.delegate,
            operators=delegated.operators,
            delegated=delegated.delegated,
            left=[LeftOut(operator=o.operator, module=o.module, why=o.why) for o in delegated.left],
        )
        if delegated
        else None,
        reason="",
        dropped=dropped,
    )


def _latency(pipeline: Pipeline, result: RungResult) -> Latency:
    timing = result.timing
    if timing is None:
        return Latency(
            median_ms=None, p90_ms=None, p99_ms=None, ci95_ms=None, samples=0, threads=pipeline.threads,
            measured_on=None, reason="dropped before it was timed",
        )  # fmt: skip
    return Latency(
        median_ms=timing.median_ms,
        p90_ms=timing.p90_ms,
        p99_ms=timing.p99_ms,
        ci95_ms=list(timing.interval),
        samples=timing.samples,
        threads=pipeline.threads,
        measured_on=this_machine(),
    )


def _accuracy(plan: Plan, drop: Drop | None) -> Accuracy:
    evaluate = plan.project.tables.evaluate
    if drop is None or evaluate is None:
        reason = (
            "no real [evaluate] data"
            if evaluate is None or evaluate.source == "synthetic"
            else "dropped before it was judged"
        )
        return Accuracy(
            metric=evaluate.metric if evaluate else None, value=None, drop=None, drop_ci95=None, samples=0,
            verdict="unmeasured", reason=reason,
        )  # fmt: skip
    settled = ladder.verdict(drop, ladder.allowed_drop(evaluate, drop.reference))
    return Accuracy(
        metric=evaluate.metric,
        value=drop.value,
        drop=drop.drop,
        drop_ci95=list(drop.interval) if drop.interval else None,
        samples=drop.samples,
        verdict=settled,
        reason=None if drop.interval else "too few samples for an interval",
        direction=evaluate.direction,
        samples_needed=drop.to_settle,
    )


def _candidate(plan: Plan, rung: Rung, result: RungResult) -> ladder.Candidate:
    latency = rung.latency
    interval = latency.ci95_ms or [float("inf"), float("inf")]
    return ladder.Candidate(
        name=rung.name,
        size_bytes=rung.size_bytes or 0,
        median_ms=float("inf") if latency.median_ms is None else latency.median_ms,
        interval=(interval[0], interval[1]),
        fails=rung.dropped or accuracy_fails(plan, result) or _over_budget(plan, rung),
    )


def _over_budget(plan: Plan, rung: Rung) -> str | None:
    """The first limit that this rung's measured figures break, where the measurement can settle it."""
    for line in _budget_lines(plan, rung, None):
        if line.verdict == "missed" and line.name != "max_drop":
            return f"{line.name} is {line.value:.4g}, {line.limit:g} is allowed"
    return None


def _best_over_budget(
    plan: Plan, results: list[RungResult], candidates: list[ladder.Candidate]
) -> ladder.Choice:
    """When only a budget stands in the way the build stays, marked; wrong outputs or accuracy raise."""
    within_accuracy = [
        ladder.Candidate(name=c.name, size_bytes=c.size_bytes, median_ms=c.median_ms, interval=c.interval)
        for result, c in zip(results, candidates, strict=True)
        if result.dropped is None and accuracy_fails(plan, result) is None
    ]
    choice = ladder.choose(within_accuracy, by_size=True)
    if choice is None:
        reasons = "; ".join(f"{c.name}: {c.fails}" for c in candidates)
        evaluate = plan.project.tables.evaluate
        metric = evaluate.metric if evaluate else "accuracy"
        kind = ModelError if all(result.exported is None for result in results) else WrongOutputsError
        raise kind(
            "no rung may ship",
            found=reasons,
            expected=f"outputs that agree, and {metric} within its limit",
            fix="raise max_drop, lower [prune] sparsity, add [recover] data, or use --precision float32",
        )
    return ladder.Choice(name=choice.name, reason="closest to the budget", runner_up=None)


def _with_reason(rung: Rung, candidate: ladder.Candidate, choice: ladder.Choice) -> Rung:
    import msgspec

    if rung.name == choice.name:
        return msgspec.structs.replace(rung, reason=choice.reason)
    if candidate.fails:
        return msgspec.structs.replace(rung, reason=candidate.fails, dropped=candidate.fails)
    return msgspec.structs.replace(rung, reason=f"{choice.name} is preferred: {choice.reason}")


def _budget_lines(plan: Plan, rung: Rung, folder: Path | None) -> list[BudgetLine]:
    """Each limit and what became of it. Only the target itself settles a latency or a memory limit."""
    budget = plan.project.tables.budget
    limits = {
        name: getattr(budget, name) for name in ("latency_ms", "first_token_ms", "size_mb", "peak_memory_mb")
    }
    if not any(limits.values()):
        limits |= {str(name): amount for name, amount in plan.target.budget.items()}
    measured_here = plan.target.is_this_machine
    values: dict[str, float | None] = {
        "size_mb": rung.size_bytes / 1e6 if rung.size_bytes else None,
        "latency_ms": _percentile(rung, budget.latency_percentile) if measured_here else None,
        "peak_memory_mb": rung.peak_memory_bytes / 1e6 if measured_here and rung.peak_memory_bytes else None,
    }
    device = DEVICE_OF_KIND.get(plan.target.kind, "adb")
    lines = []
    for name, limit in limits.items():
        if limit is None:
            continue
        value = values.get(name)
        settled: Verdict = "unmeasured" if value is None else "met" if value <= limit else "missed"
        how = f"deploy validate {folder} --device {device}" if value is None and folder else None
        lines.append(BudgetLine(name=name, limit=limit, value=value, verdict=settled, how=how))
    return lines


def _percentile(rung: Rung, percentile: float) -> float | None:
    latency = rung.latency
    return latency.median_ms if percentile <= 50 else latency.p90_ms if percentile <= 90 else latency.p99_ms


def _manifest(
    plan: Plan,
    pipeline: Pipeline,
    shipped: RungResult,
    rungs: list[Rung],
    options: BuildOptions,
    folder: Path,
) -> Manifest:
    project, exported = plan.project, shipped.exported
    assert exported is not None
    rung = next(rung for rung in rungs if rung.name == shipped.plan.name)
    by_name = {spec.name: spec for spec in project.specs()}
    return Manifest(
        model=project.name,
        target=plan.target.name,
        chip=", ".join(chip.name for chip in plan.target.chips),
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        runtime=plan.runtime.name,
        precision=shipped.plan.precision,
        shipped_rung=shipped.plan.name,
        chosen_by="device" if plan.target.is_this_machine else "host-proxy",
        fallback=plan.fallback,
        files=_artifact_files(plan, shipped),
        inputs=[_input(plan, by_name[name]) for name in exported.input_order],
        outputs=[
            Output(name=o.name, shape=o.shape, dtype=o.dtype, labels=_labels_name(plan, o.name))
            for o in exported.outputs
        ],
        recommended=Recommended(threads=pipeline.threads, batch=pipeline.batch),
        rungs=rungs,
        budget=[*_max_drop_line(plan, shipped, rung), *_budget_lines(plan, rung, folder)],
        licences=[],
        environment=environment(),
        provenance=_provenance(plan, pipeline, options),
        warnings=_warnings(plan, pipeline, shipped, rung),
    )


def _max_drop_line(plan: Plan, shipped: RungResult, rung: Rung) -> list[BudgetLine]:
    evaluate = plan.project.tables.evaluate
    if evaluate is None:
        return []
    drop = shipped.validated.drop if shipped.validated else None
    allowed = ladder.allowed_drop(evaluate, drop.reference if drop else 0.0)
    return [
        BudgetLine(name="max_drop", limit=allowed, value=rung.accuracy.drop, verdict=rung.accuracy.verdict)
    ]


def _input(plan: Plan, spec: object) -> Input:
    import msgspec

    from calibration.spec import TensorSpec

    assert isinstance(spec, TensorSpec)
    table = plan.project.tables.inputs[spec.name]
    preprocess = msgspec.to_builtins(table.preprocess) if table.preprocess else {}
    return Input(
        name=spec.name,
        shape=list(spec.shape),
        dtype=spec.dtype,
        dynamic={name: list(bounds) for name, bounds in spec.bounds.items()},
        preprocess={key: value for key, value in preprocess.items() if value is not None},
    )


def _warnings(plan: Plan, pipeline: Pipeline, shipped: RungResult, rung: Rung) -> list[str]:
    warnings = [*plan.notes, *([pipeline.unprunable] if pipeline.unprunable else [])]
    if shipped.validated and shipped.validated.warning:
        warnings.append(shipped.validated.warning)
    if rung.accuracy.value is None and rung.precision != "float32":
        warnings.append(f"{rung.name} changes the model's numbers and its accuracy was not measured")
    return warnings


def _provenance(plan: Plan, pipeline: Pipeline, options: BuildOptions) -> Provenance:
    import msgspec

    tables = plan.project.tables
    return Provenance(
        model_sha256=digest(pipeline.model_fingerprint()),
        calibration_sha256=digest(pipeline.data_fingerprint("calibration")) if tables.calibration else None,
        config_sha256=digest(msgspec.to_builtins(tables)),
        seed=options.seed,
        evaluation_sha256=digest(pipeline.data_fingerprint("evaluate")) if tables.evaluate else None,
    )


def _artifact_name(result: RungResult, *, prefix: str = "model") -> str:
    return f"{prefix}-{file_digest(result.artifact)[:HASH_LENGTH]}{result.artifact.suffix}"


def _artifact_files(plan: Plan, shipped: RungResult) -> list[File]:
    named = {_artifact_name(shipped): ("program", shipped.artifact)}
    for name, file in _label_files(plan).items():
        named[name] = ("labels", file)
    return [
        File(path=name, role=role, size_bytes=os.path.getsize(file), sha256=file_digest(file))
        for name, (role, file) in named.items()
    ]


def _labels_name(plan: Plan, output: str) -> str | None:
    table = plan.project.tables.outputs.get(output)
    if table is None or table.labels is None:
        return None
    file = plan.project.path(table.labels)
    return f"{file.stem}-{file_digest(file)[:HASH_LENGTH]}{file.suffix}"


def _label_files(plan: Plan) -> dict[str, Path]:
    files = {}
    for output, table in plan.project.tables.outputs.items():
        name = _labels_name(plan, output)
        if name and table.labels:
            files[name] = plan.project.path(table.labels)
    return files


def _files(
    plan: Plan, report: Report, shipped: RungResult, rungs: list[RungResult], options: BuildOptions
) -> dict[str, Path | bytes]:
    from deploy.reporting.html import render_report

    assert shipped.golden is not None
    files: dict[str, Path | bytes] = {_artifact_name(shipped): shipped.artifact, **_label_files(plan)}
    files |= {file.name: file for file in sorted(shipped.golden.glob("*.npz"))}
    files["plan.json"] = encode(report.plan)
    files["report.json"] = encode(report)
    files["report.html"] = render_report(report).encode()
    files["deploy.lock.toml"] = lock_toml(plan.project, plan, versions(), options.seed)
    if options.keep_rungs:
        for rung in rungs:
            if rung.exported is not None:
                files[f"rungs/{_artifact_name(rung, prefix=rung.plan.name)}"] = rung.artifact
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
