"""Measured results as the manifest's values: what was found, said in the words of the contract."""

import datetime
import os
from pathlib import Path

import msgspec

from calibration.spec import TensorSpec
from deploy import ladder
from deploy.artifacts import BuiltArtifact
from deploy.cache import digest, file_digest
from deploy.environment import environment, this_machine
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
    Rung,
    Throughput,
    Verdict,
)
from deploy.pipeline import Pipeline, RungResult
from deploy.planner import Plan
from deploy.validation.metrics import Drop
from exporters.base import Delegated

DEVICE_OF_KIND = {"phone": "adb", "board": "ssh:USER@HOST", "server": "ssh:USER@HOST", "browser": "browser"}
HASH_LENGTH = 12


def rung_record(pipeline: Pipeline, result: RungResult) -> Rung:
    """A rung as it was measured; the reason for its fate is added when one is chosen."""
    plan = pipeline.bench.plan
    validated, exported = result.validated, result.artifact.info if result.artifact else None
    cost = pipeline.variants.cost(result.plan.pattern)
    delegated = exported.delegated if exported else None
    return Rung(
        name=result.plan.name,
        pattern=result.plan.pattern,
        precision=result.plan.precision,
        sparsity=_sparsity(pipeline, result.plan.pattern),
        parameters=cost.parameters,
        macs=cost.macs,
        size_bytes=exported.size_bytes if exported else None,
        accuracy=accuracy_record(plan, validated.drop if validated else None),
        parity=validated.parity if validated else None,
        latency=_latency(pipeline, result),
        peak_memory_bytes=validated.peak_memory_bytes if validated else None,
        delegation=_delegation(delegated) if delegated else None,
        reason="",
        dropped=result.dropped,
        throughput=_throughput(result),
        sparse_execution=result.sparse_execution,
    )


def _sparsity(pipeline: Pipeline, pattern: str) -> float:
    """The share of multiply-adds that went with channels, or of zeros among a mask's weights."""
    pruned = pipeline.variants.pruned(pattern)
    if pruned is None:
        return 0.0
    if pruned.masks:
        return round(pruned.zero_share, 4)
    dense, cost = pipeline.variants.cost("dense"), pipeline.variants.cost(pattern)
    return round(1 - cost.macs / dense.macs, 4) if dense.macs else 0.0


def _throughput(result: RungResult) -> Throughput | None:
    rate = result.rate
    if rate is None:
        return None
    return Throughput(
        samples_per_s=rate.samples_per_s, ci95=list(rate.interval), batch=rate.batch, threads=rate.threads
    )


def _delegation(delegated: Delegated) -> Delegation:
    return Delegation(
        delegate=delegated.delegate,
        operators=delegated.operators,
        delegated=delegated.delegated,
        left=[LeftOut(operator=each.operator, module=each.module, why=each.why) for each in delegated.left],
    )


def _latency(pipeline: Pipeline, result: RungResult) -> Latency:
    timing = result.timing
    if timing is None:
        return Latency(
            median_ms=None, p90_ms=None, p99_ms=None, ci95_ms=None, samples=0, threads=pipeline.bench.threads,
            measured_on=None, reason="dropped before it was timed",
        )  # fmt: skip
    return Latency(
        median_ms=timing.median_ms,
        p90_ms=timing.p90_ms,
        p99_ms=timing.p99_ms,
        ci95_ms=list(timing.interval),
        samples=timing.samples,
        threads=pipeline.bench.threads,
        measured_on=this_machine(),
    )


def accuracy_record(plan: Plan, drop: Drop | None) -> Accuracy:
    """A drop with its verdict, or why there is none."""
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


def manifest_record(pipeline: Pipeline, shipped: RungResult, rungs: list[Rung], folder: Path) -> Manifest:
    """manifest.json for the shipped rung, among all that were measured."""
    plan = pipeline.bench.plan
    project, artifact = plan.project, shipped.artifact
    assert artifact is not None
    rung = next(rung for rung in rungs if rung.name == shipped.plan.name)
    by_name = {spec.name: spec for spec in project.specs()}
    return Manifest(
        model=project.name,
        target=plan.target.name,
        chip=", ".join(chip.name for chip in plan.target.chips),
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        runtime=shipped.plan.runtime,
        precision=shipped.plan.precision,
        shipped_rung=shipped.plan.name,
        chosen_by="device" if plan.target.is_this_machine else "host-proxy",
        fallback=plan.fallback,
        files=_artifact_files(plan, artifact),
        inputs=[_input(plan, by_name[name]) for name in artifact.info.input_order],
        outputs=[
            Output(name=o.name, shape=o.shape, dtype=o.dtype, labels=_labels_name(plan, o.name))
            for o in artifact.info.outputs
        ],
        recommended=_recommended(pipeline, artifact, rung),
        rungs=rungs,
        budget=[*_max_drop_line(plan, shipped, rung), *budget_lines(plan, rung, folder)],
        licences=list(plan.licences),
        environment=environment(),
        provenance=_provenance(pipeline),
        warnings=_warnings(pipeline, shipped, rung),
    )


def _recommended(pipeline: Pipeline, artifact: BuiltArtifact, rung: Rung) -> Recommended:
    """For the objective: one sample at a time, or the batch and threads with the most samples a second."""
    sharing, best = pipeline.judging.sharing(artifact), rung.throughput
    return Recommended(
        threads=best.threads if best else pipeline.bench.threads,
        batch=best.batch if best else pipeline.bench.batch(1),
        shared_rows=sharing.rows if sharing else None,
    )


def budget_lines(plan: Plan, rung: Rung, folder: Path | None) -> list[BudgetLine]:
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


def _max_drop_line(plan: Plan, shipped: RungResult, rung: Rung) -> list[BudgetLine]:
    evaluate = plan.project.tables.evaluate
    if evaluate is None:
        return []
    drop = shipped.validated.drop if shipped.validated else None
    allowed = ladder.allowed_drop(evaluate, drop.reference if drop else 0.0)
    return [
        BudgetLine(name="max_drop", limit=allowed, value=rung.accuracy.drop, verdict=rung.accuracy.verdict)
    ]


def _input(plan: Plan, spec: TensorSpec) -> Input:

    table = plan.project.tables.inputs[spec.name]
    preprocess = msgspec.to_builtins(table.preprocess) if table.preprocess else {}
    return Input(
        name=spec.name,
        shape=list(spec.shape),
        dtype=spec.dtype,
        dynamic={name: list(bounds) for name, bounds in spec.bounds.items()},
        preprocess={key: value for key, value in preprocess.items() if value is not None},
    )


def _warnings(pipeline: Pipeline, shipped: RungResult, rung: Rung) -> list[str]:
    unprunable = pipeline.variants.unprunable
    warnings = [*pipeline.bench.plan.notes, *([unprunable] if unprunable else [])]
    if shipped.validated and shipped.validated.warning:
        warnings.append(shipped.validated.warning)
    if rung.accuracy.value is None and rung.precision != "float32":
        warnings.append(f"{rung.name} changes the model's numbers and its accuracy was not measured")
    return warnings


def _provenance(pipeline: Pipeline) -> Provenance:
    bench, tables = pipeline.bench, pipeline.bench.tables
    return Provenance(
        model_sha256=digest(bench.model_key()),
        calibration_sha256=digest(bench.data_key("calibration")) if tables.calibration else None,
        config_sha256=digest(msgspec.to_builtins(tables)),
        seed=bench.seed,
        evaluation_sha256=digest(bench.data_key("evaluate")) if tables.evaluate else None,
    )


def artifact_names(artifact: BuiltArtifact, *, prefix: str = "model") -> dict[str, Path]:
    """An artifact's files by their names in the build: one hash over all of them, the program first.

    A companion whose name is not the program's keeps it: the program asks for it by that.
    """
    digests = [file_digest(file) for file in artifact.files]
    whole = digests[0] if len(digests) == 1 else digest(digests)
    own = Path(prefix)
    return {
        f"{prefix}-{whole[:HASH_LENGTH]}{file.suffix}"
        if file.stem == artifact.file.stem
        else own.with_name(file.name).as_posix(): file
        for file in artifact.files
    }


def _artifact_files(plan: Plan, artifact: BuiltArtifact) -> list[File]:
    named = [
        (name, "weights" if index else "program", file)
        for index, (name, file) in enumerate(artifact_names(artifact).items())
    ]
    named += [(name, "labels", file) for name, file in label_files(plan).items()]
    return [
        File(path=name, role=role, size_bytes=os.path.getsize(file), sha256=file_digest(file))
        for name, role, file in named
    ]


def label_files(plan: Plan) -> dict[str, Path]:
    """The outputs' label files, by their names in the build."""
    files = {}
    for output, table in plan.project.tables.outputs.items():
        name = _labels_name(plan, output)
        if name and table.labels:
            files[name] = plan.project.path(table.labels)
    return files


def _labels_name(plan: Plan, output: str) -> str | None:
    table = plan.project.tables.outputs.get(output)
    if table is None or table.labels is None:
        return None
    file = plan.project.path(table.labels)
    return f"{file.stem}-{file_digest(file)[:HASH_LENGTH]}{file.suffix}"
