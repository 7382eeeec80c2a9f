"""What each runtime really executes faster: one table, each row with its source.

A profile lists what the hardware has (features); whether zeros of some pattern are skipped is a property
of a runtime's kernels on that hardware, and stands here. A pattern without a row that says yes is refused.
"""

import re
from collections.abc import Collection, Iterable
from typing import Literal

import msgspec

from targets.errors import UsageError, nearest
from targets.profile import Chip, Precision, RuntimeSupport

Pattern = Literal["dense", "structured", "unstructured", "2:4", "block", "tiers"]
PATTERNS: tuple[Pattern, ...] = ("dense", "structured", "unstructured", "2:4", "block", "tiers")
WEIGHED: tuple[Pattern, ...] = ("2:4", "unstructured", "block")
"""Patterns that `auto` would take where a runtime gains from them, and whose absence a plan explains."""
N_OF_M = re.compile(r"[1-9]\d?:[1-9]\d?")

ANY = "*"
"""In a row's runtime: every runtime without a row of its own."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a runtime executes a pattern faster than the dense network.

    The row holds for any of `precisions` (empty: all) on a unit that has all of `needs`. `rank` orders the
    patterns that pay on the same runtime: the highest is what `auto` takes, below `STRUCTURED` only on
    request. `multiple` is what the input dimension must be divisible by.
    """

    runtime: str
    pattern: Pattern
    verdict: Literal["baseline", "faster", "no gain"]
    precisions: tuple[Precision, ...] = ()
    needs: tuple[str, ...] = ()
    rank: int = 0
    multiple: int = 1
    why: str
    source: str


STRUCTURED = 50
MEASURED = "measured, docs/measurements.md"
LI = "Li et al. 2017, Pruning Filters for Efficient ConvNets, arXiv:1608.08710"
MISHRA = "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378"
SPARSITY_BLOG = (
    "https://developer.nvidia.com/blog/accelerating-inference-with-sparsity-using-ampere-and-tensorrt"
)
SMALLER = "the result is a smaller dense network"

TABLE: tuple[Row, ...] = (
    Row(
        runtime=ANY,
        pattern="dense",
        verdict="baseline",
        why="what every other pattern is compared with",
        source="by definition",
    ),
    Row(
        runtime=ANY,
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=f"{SMALLER}: no kernel has to know about it",
        source=LI,
    ),
    Row(
        runtime="executorch",
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=f"{SMALLER}: half the channels of ResNet-18 gave 3.3x in float32, 2.6x in int8 on x86",
        source=MEASURED,
    ),
    Row(
        runtime="onnxruntime",
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=f"{SMALLER}: half the channels of ResNet-50 gave 3.8x in float32, 2.9x in int8 on x86",
        source=MEASURED,
    ),
    Row(
        runtime="openvino",
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=f"{SMALLER}: half the channels of ResNet-50 gave 4.1x in float32, 3.0x in int8 on x86",
        source=MEASURED,
    ),
    Row(
        runtime="qnn",
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=f"{SMALLER}; compiled size (speed was not measured) falls in steps of the unit's width, so whole "
        "steps must go",
        source=f"{LI}; compiled sizes {MEASURED}",
    ),
    Row(
        runtime="deepsparse",
        pattern="unstructured",
        verdict="faster",
        precisions=("float32", "int8"),
        needs=("avx2",),
        rank=70,
        why="its kernels skip zeros: ResNet-50 at 90% ran 1.7 to 1.9x (batch 1) and 4.2 to 4.6x (batch 16) "
        "faster than dense float32 in ONNX Runtime",
        source=f"{MEASURED}; https://github.com/neuralmagic/deepsparse",
    ),
    Row(
        runtime="tensorrt",
        pattern="2:4",
        verdict="faster",
        precisions=("float16", "bfloat16", "tf32", "int8", "float8"),
        needs=("sparse_tensor_cores",),
        rank=80,
        multiple=4,
        why="sparse tensor cores skip two of every four weights along the input dimension",
        source=f"{MISHRA}; {SPARSITY_BLOG}",
    ),
    Row(
        runtime="aoti",
        pattern="2:4",
        verdict="faster",
        precisions=("float16", "bfloat16", "int8", "float8"),
        needs=("sparse_tensor_cores",),
        rank=80,
        multiple=64,
        why="torch.sparse's semi-structured tensors call cuSPARSELt or CUTLASS on the sparse tensor cores; "
        "the multiple is CUTLASS's for float16 (cuSPARSELt: 16; int8: 128 and 32)",
        source="PyTorch 2.13, torch/sparse/semi_structured.py: sparse_min_cols of each back end and type; "
        "https://docs.pytorch.org/docs/stable/sparse.html",
    ),
    Row(
        runtime="vela",
        pattern="2:4",
        verdict="faster",
        precisions=("int8",),
        needs=("sparse_2_4_weights",),
        rank=30,
        multiple=16,
        why="the MAC array takes 2/4 sparse weights at twice the rate; not measured here, so only on request",
        source="Arm, Ethos-U85 announcement (April 2024): native 2/4 sparsity in hardware, twice the rate",
    ),
    Row(
        runtime="openvino",
        pattern="unstructured",
        verdict="faster",
        precisions=("int8",),
        needs=("amx_int8",),
        rank=20,
        why="weights of matrix multiplications stay packed in memory, which helps where their transfer is "
        "the limit; not measured here, so only on request",
        source="OpenVINO, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, sparse against dense int8 on 4th generation "
        "Xeon: https://docs.openvino.ai/2025/notebooks/sparsity-optimization-with-output.html",
    ),
    Row(
        runtime="executorch",
        pattern="unstructured",
        verdict="no gain",
        why="ExecuTorch 1.4.1 calls XNNPACK without asking for sparse inference: zeros are multiplied",
        source="the flags ExecuTorch passes to XNNPACK's runtime, docs/measurements.md",
    ),
    Row(
        runtime="onnxruntime",
        pattern="unstructured",
        verdict="no gain",
        why="its CPU kernels skip no zeros: 90% zeros ran at 1.02x of dense",
        source=MEASURED,
    ),
    Row(
        runtime="openvino",
        pattern="unstructured",
        verdict="no gain",
        why="sparse weights decompression needs AMX and int8; without AMX the setting did nothing",
        source=MEASURED,
    ),
    Row(
        runtime="tensorrt",
        pattern="unstructured",
        verdict="no gain",
        why="its tensor cores skip the 2:4 pattern alone, and standard sparse formats pay only at high "
        "sparsity; kernels that gain earlier (Gale et al. 2020, arXiv:2006.10901) are no part of it",
        source=f"NVIDIA, {SPARSITY_BLOG}",
    ),
    Row(
        runtime="deepsparse",
        pattern="structured",
        verdict="faster",
        rank=STRUCTURED,
        why=SMALLER,
        source=LI,
    ),
)


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not done, why, and what works instead."""

    what: str
    reason: str
    instead: str

    @property
    def message(self) -> str:
        """The three parts as one sentence."""
        return f"{self.what} is refused: {self.reason}. Instead: {self.instead}."

    def error(self) -> UsageError:
        """The same as an error of use (exit 2)."""
        return UsageError(f"{self.what} is refused: {self.reason}", fix=f"Instead: {self.instead}")


class PatternChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The pattern that pays best, the row that says so, and what was refused on the way."""

    pattern: Pattern
    row: Row
    refused: tuple[Refused, ...] = ()


class RuntimeChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The runtime to use on a chip, None where none is left, and what was passed over.

    `preferred` is what the profile prefers among those whose terms are accepted: with `runtime` None it can
    still be planned for, not built.
    """

    runtime: RuntimeSupport | None
    preferred: RuntimeSupport
    refused: tuple[Refused, ...] = ()


def lookup(runtime: str, pattern: str, precision: str | None, features: Collection[str]) -> Row | None:
    """The row that answers for this combination, yes before no, the runtime's own before the general.

    With `precision` None any of the row's precisions will do.
    """
    rows = [
        row
        for row in TABLE
        if row.pattern == pattern
        and row.runtime in (runtime, ANY)
        and (precision is None or not row.precisions or precision in row.precisions)
        and all(need in features for need in row.needs)
    ]
    return min(rows, key=lambda row: (row.verdict == "no gain", row.runtime == ANY), default=None)


def executes(runtime: str, pattern: str, precision: str | None, features: Collection[str]) -> Row | None:
    """The row that says this runtime gains from the pattern (or that it is plain dense); None otherwise."""
    row = lookup(runtime, pattern, precision, features)
    return None if row is None or row.verdict == "no gain" else row


def choose_pattern(
    chip: Chip,
    runtime: RuntimeSupport,
    *,
    precision: str | None = None,
    accepted_licences: Collection[str] = (),
) -> PatternChoice:
    """The pattern that pays best for this runtime on this chip.

    A pattern whose runtime needs terms that were not accepted falls back to structured, which any runtime
    executes.
    """
    paying = _paying_rows(chip, runtime, precision)
    accepted = not runtime.licence or runtime.licence in accepted_licences
    allowed = [row for row in paying if accepted or row.rank <= STRUCTURED]
    chosen = max(allowed, key=lambda row: row.rank)
    patterns = {row.pattern for row in paying}
    refused = [
        _licence_refusal(runtime, f"{row.pattern} with {runtime.name}")
        for row in paying
        if row not in allowed
    ]
    refused += [
        explain_refusal(chip, runtime, pattern, precision=precision)
        for pattern in WEIGHED
        if pattern not in patterns
    ]
    return PatternChoice(pattern=chosen.pattern, row=chosen, refused=tuple(refused))


def choose_runtime(
    chip: Chip, *, available: Collection[str], accepted_licences: Collection[str] = ()
) -> RuntimeChoice:
    """The first of the chip's runtimes that is available and whose terms are accepted."""
    accepted = [runtime for runtime in chip.runtimes if runtime.licence in {"", *accepted_licences}]
    refused: list[Refused] = []
    for runtime in chip.runtimes:
        if runtime not in accepted:
            refused.append(_licence_refusal(runtime, runtime.name))
        elif runtime.name not in available:
            refused.append(_lack(runtime))
        else:
            return RuntimeChoice(runtime=runtime, preferred=accepted[0], refused=tuple(refused))
    preferred = accepted[0] if accepted else chip.runtimes[0]
    return RuntimeChoice(runtime=None, preferred=preferred, refused=tuple(refused))


def explain_refusal(
    chip: Chip, runtime: RuntimeSupport, pattern: str, *, precision: str | None = None
) -> Refused:
    """Why a pattern brings nothing here, what would, and how to have it for storage alone."""
    row = lookup(runtime.name, pattern, precision, chip.features_for(runtime))
    reason = row.why if row else _missing(runtime, pattern, precision, chip.features_for(runtime))
    return Refused(
        what=f"{pattern} sparsity on {chip.title} with {runtime.name}",
        reason=f"nothing there executes it faster: {reason}",
        instead=f"{_what_works(chip, runtime)}; --objective size allows it for storage only",
    )


def require_executable(
    chip: Chip, runtime: RuntimeSupport, pattern: str, *, precision: str | None = None
) -> Row:
    """The row that allows this pattern; raises UsageError (exit 2) that explains the refusal otherwise."""
    check_pattern(pattern)
    row = executes(runtime.name, pattern, precision, chip.features_for(runtime))
    if row is None:
        raise explain_refusal(chip, runtime, pattern, precision=precision).error()
    return row


def check_pattern(pattern: str) -> None:
    """Raises UsageError for a word that is no pattern; any N:M is one."""
    if pattern in PATTERNS or N_OF_M.fullmatch(pattern):
        return
    raise UsageError(
        f"there is no pattern {pattern!r}",
        expected=f"one of {', '.join(PATTERNS)}, or N:M such as 4:8",
        fix=f"did you mean {nearest(pattern, list(PATTERNS), 1)[0]}?",
    )


def _paying_rows(chip: Chip, runtime: RuntimeSupport, precision: str | None) -> list[Row]:
    features = chip.features_for(runtime)
    rows = (executes(runtime.name, pattern, precision, features) for pattern in PATTERNS)
    return [row for row in rows if row is not None]


def _missing(runtime: RuntimeSupport, pattern: str, precision: str | None, features: Collection[str]) -> str:
    """What keeps this runtime from the pattern, from the rows that would have said yes."""
    wishes = [
        row
        for row in TABLE
        if row.runtime == runtime.name and row.pattern == pattern and row.verdict == "faster"
    ]
    for row in wishes:
        if lacking := [need for need in row.needs if need not in features]:
            return f"{runtime.name} needs {', '.join(lacking)}, which this unit lacks"
        if precision is not None and row.precisions and precision not in row.precisions:
            return f"{runtime.name} does so in {', '.join(row.precisions)}, not in {precision}"
    return f"no kernel of {runtime.name} is known to skip it (docs/truth.md)"


def _what_works(chip: Chip, runtime: RuntimeSupport) -> str:
    """The best pattern of the runtime asked for, then those of the chip's other runtimes that beat it."""
    best = max(_paying_rows(chip, runtime, None), key=lambda row: row.rank)
    multiple = chip.width_multiple(runtime)
    step = f" in steps of {multiple} channels" if best.pattern == "structured" and multiple > 1 else ""
    others = _others(chip, [other for other in chip.runtimes if other.name != runtime.name], best)
    return f"{best.pattern}{step} works here" + (f" ({others})" if others else "")


def _others(chip: Chip, runtimes: Iterable[RuntimeSupport], best: Row) -> str:
    words = []
    for other in runtimes:
        row = max(_paying_rows(chip, other, None), key=lambda row: row.rank)
        if row.rank > best.rank:
            terms = f" --accept-license {other.licence}" if other.licence else ""
            words.append(f"{row.pattern} with --runtime {other.name}{terms}")
    return ", ".join(words)


def _lack(runtime: RuntimeSupport) -> Refused:
    return Refused(
        what=runtime.name, reason="this version or machine lacks it", instead="the target's next runtime"
    )


def _licence_refusal(runtime: RuntimeSupport, what: str) -> Refused:
    return Refused(
        what=what,
        reason=f"the licence {runtime.licence} was not accepted",
        instead=f"--accept-license {runtime.licence} after reading its terms, or go without",
    )
