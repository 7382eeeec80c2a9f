"""The rungs of a plan: each made, judged, and timed beside the others.

Stages are lazy and cached: a stage whose result is there loads neither the model nor torch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import ladder
from deploy.artifacts import Artifacts, BuiltArtifact
from deploy.judging import Judging
from deploy.manifest import SparseExecution
from deploy.planner import Plan, RungPlan
from deploy.variants import Variants
from deploy.workbench import Workbench, read_json
from exporters.base import CONTROLLED, EXPORTERS, GAIN_DB
from targets.errors import DeployError, MissingRequirementError, ModelError, WrongOutputsError

if TYPE_CHECKING:
    from deploy.validation.latency import Timing
    from deploy.validation.result import Validated
    from deploy.validation.throughput import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """A rung that was made and judged; `dropped` says why it cannot ship."""

    plan: RungPlan
    artifact: BuiltArtifact | None = None
    validated: "Validated | None" = None
    golden: Path | None = None
    timing: "Timing | None" = None
    rate: "Rate | None" = None
    sparse_execution: SparseExecution | None = None
    dropped: str | None = None


class Pipeline:
    """All stages of one run, in their rooms."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.variants = Variants(bench)
        self.artifacts = Artifacts(bench, self.variants)
        self.judging = Judging(bench, self.variants, self.artifacts)

    def close(self) -> None:
        """Ends the processes that the stages kept."""
        self.artifacts.close()

    def rungs(self) -> list[RungResult]:
        """Every rung of the plan: made, validated and timed. Raises for a wrong float32 export."""
        made = [self._make(rung) for rung in self._planned()]
        made += [self._make(replace(rung.plan, mixed=True)) for rung in made if self._wants_mixed(rung, made)]
        made += [
            self._make(replace(rung.plan, variant=CONTROLLED))
            for rung in made
            if self._wants_control(rung, made)
        ]
        sound = [rung.artifact for rung in made if rung.artifact and rung.dropped is None]
        timings, rates = self.judging.time(sound), self.judging.rates(sound)
        return [
            replace(rung, timing=timings.get(rung.plan.name), rate=rates.get(rung.plan.name)) for rung in made
        ]

    def _planned(self) -> tuple[RungPlan, ...]:
        """The plan's rungs; without those whose pattern finds nothing to prune in the model."""
        planned = self.bench.plan.rungs
        possible = tuple(rung for rung in planned if not self.variants.cannot_prune(rung.pattern))
        return possible or tuple(replace(rung, pattern="dense") for rung in planned)

    def _make(self, rung: RungPlan) -> RungResult:
        """One rung exported and validated. One that fails is dropped, but for two that raise.

        A float32 program with wrong outputs is a wrong export; a float32 model that its runtime cannot hold
        ends the build, unless other runtimes compete.
        """
        from deploy.validation.result import Validated

        result = RungResult(plan=rung)
        try:
            result = replace(result, artifact=(artifact := self.artifacts.make(rung)))
            entry = self.judging.validate(artifact)
            validated: Validated = read_json(entry.folder / "validated.json", Validated)
            zeros = None if validated.wrong else self.judging.sparse_execution(artifact)
        except (ModelError, WrongOutputsError, MissingRequirementError) as error:
            if not self._may_fail(rung, error):
                raise
            return replace(result, dropped=error.message)
        dropped = validated.wrong or self._unskipped(zeros)
        if dropped:
            self.artifacts.end(artifact)
        return replace(
            result, validated=validated, golden=entry.folder, dropped=dropped, sparse_execution=zeros
        )

    def _unskipped(self, zeros: SparseExecution | None) -> str | None:
        """Why a masked rung may not ship: its runtime gains nothing from the zeros that it paid for."""
        if zeros is None or zeros.ci95[0] > 1 or self.bench.plan.objective == "size":
            return None
        ratio = f"{zeros.gain:.2f}x of the same graph with dense weights"
        return f"zeros are not skipped: {ratio}, 95% interval [{zeros.ci95[0]:.2f}, {zeros.ci95[1]:.2f}]"

    def _may_fail(self, rung: RungPlan, error: DeployError) -> bool:
        """Whether the other rungs go on without this one."""
        if isinstance(error, MissingRequirementError):
            return rung.competes and EXPORTERS[rung.runtime].isolated
        lacks = isinstance(error, ModelError) and rung.competes
        return rung.precision != "float32" or lacks or (EXPORTERS[rung.runtime].isolated and rung.competes)

    def _wants_mixed(self, rung: RungResult, made: list[RungResult]) -> bool:
        """Whether quantization costs accuracy that a few layers in float would bring back."""
        if self.bench.foreign or not self._too_noisy(rung, made):
            return False
        assert rung.validated is not None
        parity = rung.validated.parity
        return rung.dropped is None or parity.snr_db >= (parity.min_snr_db or 0.0) - GAIN_DB

    def _wants_control(self, rung: RungResult, made: list[RungResult]) -> bool:
        """Whether quantization costs accuracy, and its quantizer can look for the operators that do it.

        That takes minutes: a mixed rung that may ship spares them.
        """
        controlled = EXPORTERS[rung.plan.runtime].controlled
        if rung.plan.mixed or rung.plan.variant not in controlled or not self._too_noisy(rung, made):
            return False
        mixed = [other for other in made if other.plan == replace(rung.plan, mixed=True)]
        return not any(self._sound(other) for other in mixed)

    def _too_noisy(self, rung: RungResult, made: list[RungResult]) -> bool:
        """Whether a rung in static int8 may not ship for its outputs, while the float ones may."""
        plan = self.bench.plan
        if rung.plan.precision != "int8" or len(plan.rungs) == 1 or rung.validated is None:
            return False
        same = [r for r in made if (r.plan.runtime, r.plan.pattern) == (rung.plan.runtime, rung.plan.pattern)]
        floats = [r for r in same if r.plan.precision == "float32"]
        return not self._sound(rung) and not any(accuracy_fails(plan, other) for other in floats)

    def _sound(self, rung: RungResult) -> bool:
        return rung.dropped is None and accuracy_fails(self.bench.plan, rung) is None


def accuracy_fails(plan: Plan, rung: RungResult) -> str | None:
    """Why a judged rung may not ship for its accuracy; None when it may, or when nothing was measured."""
    evaluate = plan.project.tables.evaluate
    drop = rung.validated.drop if rung.validated else None
    return None if evaluate is None or drop is None else ladder.drop_fails(drop, evaluate)
