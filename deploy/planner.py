"""From a project and a target to a plan: what will be done, why, and what was refused. Loads no model."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from deploy import foreign
from deploy.manifest import PlanRecord, PlanStep, Refusal
from deploy.project import Project
from exporters.base import EXPORTERS, Form, at_hand, int8_variants
from targets import truth
from targets.errors import UsageError, nearest
from targets.profile import Chip, RuntimeSupport, Target

DEFAULT_SPARSITY = {"structured": 0.3, "unstructured": 0.8}
"""By pattern; every other one states its own. At 80% of the weights zero a sparse engine begins to gain."""
GAINS_FROM = 0.7
"""The share of zeros from which sparse kernels gain (docs/measurements.md)."""
TERMS = {
    "deepsparse": "the community licence of DeepSparse 1.8.0: evaluation and research, not production; the "
    "product ended in June 2025 and has no successor",
}
"""What a person accepts with --accept-license."""
LICENCES = tuple(TERMS)
RUNG_WORDS = {"float32": "float"}
METHODS = {
    "structured": {"auto": "channels", "channels": "channels"},
    "unstructured": {"auto": "magnitude", "magnitude": "magnitude"},
}
"""The methods by pattern, and the one that each word stands for; other masks take those of unstructured."""
CRITERIA = ("auto", "l1", "l2", "bn", "taylor", "median", "random")
OBJECTIVES = ("latency", "throughput", "size")
COMPETING_KINDS = ("host", "server", "laptop")
"""Targets where any runtime may serve: all that are at hand and do without torch compete.

A phone's app brings one.
"""
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class RungPlan:
    """A rung to make: its name says pattern and precision, and the runtime where several compete.

    `variant` tells kinds of int8 apart; `mixed` keeps the layers float that int8 hurts most.
    """

    runtime: str
    precision: str
    pattern: str = "dense"
    variant: str = ""
    mixed: bool = False
    competes: bool = False

    @property
    def pruned(self) -> bool:
        """Whether something was removed."""
        return self.pattern != "dense"

    @property
    def quantized(self) -> bool:
        """Whether weights become integers, and calibration data matters."""
        return self.precision.startswith("int")

    @property
    def name(self) -> str:
        """For example "pruned-int8", or "openvino/dense-int8-qdq"; float32 is called float."""
        words = [
            "pruned" if self.pruned else "dense",
            RUNG_WORDS.get(self.precision, self.precision),
            self.variant,
            "mixed" if self.mixed else "",
        ]
        name = "-".join(word for word in words if word)
        return f"{self.runtime}/{name}" if self.competes else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What is removed: `sparsity` of `of`; `asked` when a person gave it.

    Channels go in steps of `multiple`; masks (every other pattern) set weights to zero.
    """

    pattern: str
    method: str
    criterion: str
    sparsity: float
    of: str
    ranking: str
    min_channels: int
    multiple: int
    exclude: tuple[str, ...]
    asked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before the model is loaded. `runtime` is the first of `runtimes`, which compete.

    `pattern` is what the first runtime executes; `prunings` holds what is removed for each pattern that some
    runtime is given.
    """

    project: Project
    target: Target
    runtimes: tuple[RuntimeSupport, ...]
    pattern: str
    precision: str
    prunings: Mapping[str, Pruning]
    rungs: tuple[RungPlan, ...]
    steps: tuple[PlanStep, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    fallback: str | None
    objective: str
    licences: tuple[str, ...] = ()

    @property
    def pruning(self) -> Pruning | None:
        """What is removed for the first runtime."""
        return self.prunings.get(self.pattern)

    @property
    def runtime(self) -> RuntimeSupport:
        """The runtime that is planned first."""
        return self.runtimes[0]

    @property
    def buildable(self) -> bool:
        """Whether this version has the exporter."""
        return self.runtime.name in EXPORTERS

    @property
    def serves(self) -> bool:
        """Whether the target answers requests of others: a server, or the machine at hand."""
        return self.target.kind in COMPETING_KINDS

    @property
    def saturates(self) -> bool:
        """Whether sums of 8-bit products overflow on some chip of the target: x86 without VNNI."""
        return any(
            chip.architecture == "x86_64" and not {*VNNI} & {*chip.features} for chip in self.target.chips
        )

    @property
    def signed_activations(self) -> bool:
        """Whether the target's integer kernels take signed activations: Arm's do."""
        return self.target.chips[0].architecture != "x86_64"

    def __repr__(self) -> str:
        from deploy.reporting.notebook import plan_text

        return plan_text(self.record())

    def record(self) -> PlanRecord:
        """The plan as plan.json holds it."""
        return PlanRecord(
            model=self.project.name,
            target=self.target.name,
            chip=", ".join(chip.name for chip in self.target.chips),
            runtime=self.runtime.name,
            pattern=self.pattern,
            precision=self.precision,
            steps=list(self.steps),
            rungs=[rung.name for rung in self.rungs],
            refused=list(self.refused),
            notes=list(self.notes),
        )


def make_plan(
    project: Project,
    target: Target,
    *,
    runtimes: Sequence[str] = (),
    objective: str = "latency",
    accepted_licences: Collection[str] = (),
    ladder: bool = True,
) -> Plan:
    """The plan for a project whose flags and target tables are already laid over.

    `runtimes` are those that compete, the first one planned; without any the target and machine decide.
    Raises UsageError for a pattern that nothing on the target executes, and for words nobody knows.
    """
    _check_words(project, objective, accepted_licences)
    wanted = next(iter(runtimes), None)
    support, passed_over, fallback = _choose_runtime(project, target, wanted, accepted_licences)
    rivals = (
        _wanted(target, runtimes[1:], accepted_licences)
        if runtimes
        else _rivals(target, support, accepted_licences)
    )
    supports = (support, *rivals) if ladder else (support,)
    precision, precision_reason = _choose_precision(project, supports)
    supports = tuple(each for each in supports if _tried(project, each))
    support = supports[0]
    pattern, reason, refused = _choose_pattern(project, target, support, objective, accepted_licences)
    patterns = {support.name: pattern} | {
        rival.name: _rival_pattern(project, target, rival, pattern, objective, accepted_licences)
        for rival in supports[1:]
    }
    prunings, unpruned = _choose_prunings(project, supports, patterns)
    rungs = _rungs(project, supports, precision, {n: p for n, p in patterns.items() if p in prunings}, ladder)
    licences = tuple(dict.fromkeys(each.licence for each in supports if each.licence))
    notes = _notes(project, target, support, prunings.get(pattern), unpruned)
    return Plan(
        project=project,
        target=target,
        runtimes=supports,
        pattern=pattern,
        precision=precision,
        prunings=prunings,
        rungs=rungs,
        steps=_steps(project, supports, prunings.get(pattern), precision, reason, precision_reason),
        refused=tuple(
            Refusal(what=r.what, reason=r.reason, instead=r.instead) for r in (*passed_over, *refused)
        ),
        notes=notes,
        fallback=fallback,
        objective=objective,
        licences=licences,
    )


def _check_words(project: Project, objective: str, accepted_licences: Collection[str]) -> None:
    prune = project.tables.prune
    _one_of("the objective", objective, OBJECTIVES)
    _one_of(
        "prune.method", prune.method, tuple(dict.fromkeys(w for words in METHODS.values() for w in words))
    )
    _one_of("prune.criterion", prune.criterion, CRITERIA)
    for licence in accepted_licences:
        _one_of("--accept-license", licence, LICENCES)
    if prune.pattern not in ("auto", "none"):
        truth.check_pattern(prune.pattern)


def _one_of(what: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UsageError(
            f"{what} is unknown",
            found=repr(word),
            expected=", ".join(known),
            fix=f"did you mean {nearest(word, known, 1)[0]!r}?",
        )


def _exporters(project: Project) -> list[str]:
    """The runtimes whose exporter can start from the project's model."""
    if not foreign.is_model(project.tables.model.source):
        return list(EXPORTERS)
    return [name for name, entry in EXPORTERS.items() if entry.accepts is Form.ONNX]


def _choose_runtime(
    project: Project, target: Target, wanted: str | None, accepted: Collection[str]
) -> tuple[RuntimeSupport, tuple[truth.Refused, ...], str | None]:
    """The wanted runtime, else the first that this version has, else the target's preferred one."""
    chip, shared = target.chips[0], _shared(target)
    if wanted is not None:
        if wanted in EXPORTERS and wanted not in _exporters(project):
            raise UsageError(
                f"{wanted} cannot hold {project.tables.model.source}",
                found="an ONNX model",
                expected=f"a torch model, or one of {', '.join(_exporters(project))}",
                fix=f"use --runtime {_exporters(project)[0]}, or name the torch model it came from",
            )
        return _wanted(target, [wanted], accepted)[0], (), None
    available = {name for name in _exporters(project) if at_hand(name)} & {support.name for support in shared}
    choice = truth.choose_runtime(chip, available=available, accepted_licences=accepted)
    if choice.runtime is None:
        licensed = [support for support in shared if not support.licence or support.licence in accepted]
        return _across_chips(target, licensed[0].name), _licence_only(choice.refused), None
    fallback = None
    if choice.runtime.name != shared[0].name:
        fallback = f"{choice.runtime.name} stands in for {shared[0].name}: {choice.refused[0].reason}"
    return _across_chips(target, choice.runtime.name), choice.refused, fallback


def _shared(target: Target) -> list[RuntimeSupport]:
    """The runtimes that every chip of the target has, in order of preference."""
    return [
        support
        for support in target.chips[0].runtimes
        if all(_support(other, support.name) for other in target.chips)
    ]


def _wanted(target: Target, names: Sequence[str], accepted: Collection[str]) -> tuple[RuntimeSupport, ...]:
    """Runtimes by name. Raises UsageError for one that the target lacks, or whose terms were not accepted."""
    known = tuple(support.name for support in _shared(target))
    for name in names:
        _one_of(f"the runtime for {target.name}", name, known)
    supports = tuple(_across_chips(target, name) for name in names)
    for support in supports:
        if support.licence not in {"", *accepted}:
            raise UsageError(
                f"{support.name} is used only where its terms were read and accepted",
                found=TERMS[support.licence],
                expected=f"--accept-license {support.licence}",
                fix=f"read them, then add --accept-license {support.licence}, or choose another --runtime",
            )
    return supports


def _rivals(target: Target, chosen: RuntimeSupport, accepted: Collection[str]) -> tuple[RuntimeSupport, ...]:
    """The other runtimes of the same unit that this version and machine have, and a server can ship."""
    if target.kind not in COMPETING_KINDS or chosen.name not in EXPORTERS:
        return ()
    names = [
        support.name
        for support in _shared(target)
        if support.name != chosen.name and support.unit == chosen.unit and support.licence in {"", *accepted}
    ]
    return tuple(_across_chips(target, name) for name in names if at_hand(name) and EXPORTERS[name].competes)


def _licence_only(refused: tuple[truth.Refused, ...]) -> tuple[truth.Refused, ...]:
    return tuple(refusal for refusal in refused if "lacks it" not in refusal.reason)


def _support(chip: Chip, name: str) -> RuntimeSupport | None:
    return next((support for support in chip.runtimes if support.name == name), None)


def _across_chips(target: Target, name: str) -> RuntimeSupport:
    """The runtime as all chips of the target can use it: one package ships to all of them."""
    supports = [support for chip in target.chips if (support := _support(chip, name))]
    first = supports[0]
    return RuntimeSupport(
        name=first.name,
        unit=first.unit,
        channel_multiple=math.lcm(
            *(chip.width_multiple(s) for chip, s in zip(target.chips, supports, strict=True))
        ),
        precisions=tuple(p for p in first.precisions if all(p in support.precisions for support in supports)),
        threads=min(support.threads for support in supports),
        licence=first.licence,
    )


def _choose_pattern(
    project: Project, target: Target, support: RuntimeSupport, objective: str, accepted: Collection[str]
) -> tuple[str, str, tuple[truth.Refused, ...]]:
    """The pattern, the reason for it, and the refusals. Raises UsageError for what nothing executes."""
    wanted, chip = project.tables.prune.pattern, target.chips[0]
    own = _support(chip, support.name) or support
    if wanted == "none":
        return "dense", "deploy.toml or a flag asks for no pruning", ()
    if wanted == "auto":
        choice = truth.choose_pattern(chip, own, accepted_licences=accepted)
        return choice.pattern, f"{choice.row.why} ({choice.row.source})", choice.refused
    if objective == "size":
        return wanted, "asked for with --objective size: storage only, no speed is promised", ()
    row = truth.require_executable(chip, own, wanted)
    return wanted, f"{row.why} ({row.source})", ()


def _rival_pattern(
    project: Project,
    target: Target,
    rival: RuntimeSupport,
    planned: str,
    objective: str,
    accepted: Collection[str],
) -> str:
    """What a competing runtime is given: its own best pattern, or the one asked for where it gains from it.

    A sparsity that a person gave was meant for the planned pattern.
    """
    prune, chip = project.tables.prune, target.chips[0]
    own = _support(chip, rival.name) or rival
    if prune.pattern != "auto":
        fits = objective == "size" or truth.executes(own.name, planned, None, chip.features_for(own))
        return planned if fits else "dense"
    best = truth.choose_pattern(chip, own, accepted_licences=accepted).pattern
    return best if prune.sparsity is None or best == planned else "dense"


def _choose_prunings(
    project: Project, supports: tuple[RuntimeSupport, ...], patterns: Mapping[str, str]
) -> tuple[dict[str, Pruning], tuple[str, ...]]:
    """What to remove for each pattern, and the reasons where nothing is."""
    prunings: dict[str, Pruning] = {}
    reasons: list[str] = []
    planned = patterns[supports[0].name]
    for pattern in dict.fromkeys(patterns.values()):
        users = [support for support in supports if patterns[support.name] == pattern]
        pruning, reason = _choose_pruning(project, pattern, users)
        if reason:
            whose = "" if pattern == planned else f"{', '.join(each.name for each in users)}: "
            reasons.append(f"{whose}{reason}")
        if pruning:
            prunings[pattern] = pruning
    return prunings, tuple(reasons)


def _choose_pruning(
    project: Project, pattern: str, users: Sequence[RuntimeSupport]
) -> tuple[Pruning | None, str | None]:
    prune, evaluate = project.tables.prune, project.tables.evaluate
    if pattern == "dense":
        return None, None
    if pattern == "structured" and foreign.is_model(project.tables.model.source):
        return None, _unprunable(prune.sparsity, pattern)
    measurable = evaluate is not None and evaluate.source != "synthetic"
    if prune.sparsity is None and not measurable:
        return (
            None,
            "nothing is pruned: without real [evaluate] data its cost in accuracy cannot be measured; "
            "[prune] sparsity asks for it all the same",
        )
    words = METHODS.get(pattern, METHODS["unstructured"])
    _one_of(f"prune.method for {pattern} sparsity", prune.method, tuple(words))
    pruning = Pruning(
        pattern=pattern,
        method=words[prune.method],
        criterion=prune.criterion,
        sparsity=DEFAULT_SPARSITY.get(pattern, 0.5) if prune.sparsity is None else prune.sparsity,
        of=prune.of if pattern == "structured" else "weights",
        ranking=prune.ranking,
        min_channels=prune.min_channels,
        multiple=math.lcm(*(each.channel_multiple for each in users)),
        exclude=tuple(prune.exclude),
        asked=prune.sparsity is not None,
    )
    return pruning, None


def _unprunable(sparsity: float | None, pattern: str) -> str:
    """Why an ONNX model keeps its channels. Raises UsageError where a person asked for a sparsity."""
    reason = "channels are found by autograd through torch's layers, which an ONNX model no longer has"
    if sparsity is not None and pattern == "structured":
        raise UsageError(
            "structured pruning of an ONNX model is refused",
            found=f"sparsity {sparsity:g}: {reason}",
            expected="the torch model that it was exported from",
            fix='name that as [model] source, or set [prune] pattern = "none"; quantization works as it is',
        )
    return f"nothing is pruned: {reason}"


def _choose_precision(project: Project, supports: tuple[RuntimeSupport, ...]) -> tuple[str, str]:
    """The planned precision, and the reason. Raises UsageError for one that no runtime here has."""
    wanted = project.tables.quantize.precision
    if wanted != "auto":
        offered = tuple(dict.fromkeys(each for support in supports for each in _offered(support)))
        _one_of(f"quantize.precision for {supports[0].name}", wanted, offered)
        return wanted, "asked for"
    if "int8" not in supports[0].precisions:
        return supports[0].precisions[0], f"{supports[0].name} runs no int8 on this target"
    return "int8", "a quarter of the bytes, and integer kernels on this target"


def _offered(support: RuntimeSupport) -> tuple[str, ...]:
    """The precisions that may be asked for, dynamic int8 among them where the exporter can make it."""
    entry = EXPORTERS.get(support.name)
    dynamic = "int8" in support.precisions and (entry is None or entry.dynamic_int8)
    weights = entry is not None and entry.weight_int4
    return (*support.precisions, *(("int8-dynamic",) if dynamic else ()), *(("int4",) if weights else ()))


def _rungs(
    project: Project,
    supports: tuple[RuntimeSupport, ...],
    precision: str,
    patterns: Mapping[str, str],
    ladder: bool,
) -> tuple[RungPlan, ...]:
    """Every rung that the ladder tries: all dense ones first, then those pruned as their runtime gains."""
    if not ladder:
        first = supports[0].name
        return (RungPlan(runtime=first, pattern=patterns.get(first, "dense"), precision=precision),)
    dense = [
        RungPlan(runtime=support.name, precision=each, variant=variant, competes=len(supports) > 1)
        for support in supports
        for each in _tried(project, support)
        for variant in _variants(support, each)
    ]
    pruned = (replace(r, pattern=patterns[r.runtime]) for r in dense if r.runtime in patterns)
    return (*dense, *pruned)


def _tried(project: Project, support: RuntimeSupport) -> tuple[str, ...]:
    """The precisions that a runtime's rungs have; none where it lacks the one asked for."""
    wanted, offered = project.tables.quantize.precision, _offered(support)
    if wanted != "auto":
        return (wanted,) if wanted in offered else ()
    if "int8" not in offered:
        return (offered[0],)
    integers = any(table.dtype.startswith("int") for table in project.tables.inputs.values())
    return tuple(
        each
        for each in ("float32", "bfloat16", "int8", "int8-dynamic")
        if each in offered and (each != "int8-dynamic" or integers)
    )


def _variants(support: RuntimeSupport, precision: str) -> tuple[str, ...]:
    return int8_variants(support.name) if precision == "int8" and support.name in EXPORTERS else ("",)


def _steps(
    project: Project,
    supports: tuple[RuntimeSupport, ...],
    pruning: Pruning | None,
    precision: str,
    pattern_reason: str,
    precision_reason: str,
) -> tuple[PlanStep, ...]:
    recover = project.tables.recover
    entry = EXPORTERS.get(supports[0].name)
    form = entry.accepts if entry else Form.GRAPH
    steps: list[tuple[str, Form, Form, str]] = []
    if pruning:
        how = f"{pruning.sparsity:.0%} of {pruning.of}"
        how += f", widths in multiples of {pruning.multiple}" if pruning.pattern == "structured" else " zero"
        steps.append(("prune", Form.MODULE, Form.MODULE, f"{how}: {pattern_reason}"))
    if pruning and recover and not foreign.is_model(project.tables.model.source):
        steps.append(
            ("recover", Form.MODULE, Form.MODULE, f"{recover.epochs} epochs with the dense model as teacher")
        )
    steps.append(("capture", Form.MODULE, Form.GRAPH, "torch.export, batch-norm folded into convolutions"))
    if form is Form.ONNX:
        steps.append(("convert", Form.GRAPH, Form.ONNX, f"{supports[0].name} reads ONNX"))
    if precision != "float32":
        steps.append(("quantize", form, form, f"{precision}: {precision_reason}"))
    steps.append(("export", form, Form.ARTIFACT, _export_reason(supports)))
    steps.append(
        (
            "validate",
            Form.ARTIFACT,
            Form.REPORT,
            "outputs, accuracy and latency of every rung, in a process of its own",
        )
    )
    planned = tuple(PlanStep(name=n, accepts=a.value, produces=p.value, reason=r) for n, a, p, r in steps)
    _check_neighbours(planned)
    return planned


def _export_reason(supports: tuple[RuntimeSupport, ...]) -> str:
    if len(supports) == 1:
        return f"the target's first runtime at hand is {supports[0].name}"
    return f"{', '.join(support.name for support in supports)} compete: the measurement decides"


def _check_neighbours(steps: tuple[PlanStep, ...]) -> None:
    for before, after in itertools.pairwise(steps):
        if before.produces != after.accepts:
            raise ValueError(f"{before.name} gives {before.produces}, {after.name} takes {after.accepts}")


def _notes(
    project: Project,
    target: Target,
    support: RuntimeSupport,
    pruning: Pruning | None,
    unpruned: tuple[str, ...],
) -> tuple[str, ...]:
    notes = list(unpruned)
    if pruning and project.tables.recover and foreign.is_model(project.tables.model.source):
        notes.append("an ONNX model is not recovered after pruning: there is nothing to train")
    if support.name not in EXPORTERS:
        notes.append(
            f"this version has no exporter for {support.name}: the plan stands, the build does not (exit 3)"
        )
    if pruning and pruning.pattern == "unstructured" and pruning.sparsity < GAINS_FROM:
        notes.append(
            f"{pruning.sparsity:.0%} of the weights zero is less than sparse kernels gain from "
            f"({GAINS_FROM:.0%} to 95%): [target.{target.name}.prune] sparsity asks for more on this target"
        )
    if support.licence:
        notes.append(f"{support.name} comes under {TERMS[support.licence]}")
    if len(target.chips) > 1:
        chips = " or ".join(chip.title for chip in target.chips)
        notes.append(f"{target.title} is sold with {chips}: one package for all, its widths fit all")
    if project.tables.calibration is None or project.tables.calibration.source == "synthetic":
        notes.append("calibration data is synthetic: int8 ranges are guesses")
    if project.tables.evaluate is None or project.tables.evaluate.source == "synthetic":
        notes.append("accuracy stays unmeasured: there is no real [evaluate] data")
    notes += [f"{key} of deploy.toml is not read by this version" for key in project.unread()]
    return tuple(notes)
