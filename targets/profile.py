"""The values that describe a piece of hardware. They read like its datasheet and hold no behaviour.

They are the schema of the files in catalog/ too: an unknown key or a wrong type in a file is refused.
"""

import math
from typing import Annotated, Literal

import msgspec

Precision = Literal["float32", "tf32", "float16", "bfloat16", "float8", "int16", "int8", "int4"]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Amount = Annotated[float, msgspec.Meta(gt=0)]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]

CPU = "cpu"


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value of a hardware profile."""


class Fact(Profile, frozen=True, kw_only=True):
    """Where a number comes from, and what other sources say."""

    source: Word
    note: str = ""


class Cluster(Profile, frozen=True, kw_only=True):
    """Cores of one kind on a CPU; `isa` holds what these cores have beyond the chip's features."""

    name: Word
    cores: Count
    max_ghz: Amount | None = None
    isa: tuple[Word, ...] = ()


class Memory(Profile, frozen=True, kw_only=True):
    """Main memory as seen by the chip (for a graphics card, the card's own)."""

    size_gb: Amount | None = None
    bandwidth_gb_s: Amount | None = None


class Accelerator(Profile, frozen=True, kw_only=True):
    """An NPU, DSP, GPU or matrix unit beside the CPU.

    `kind` is what a runtime's `unit` refers to. Layer widths that are no multiple of `width_step` cost
    as much as the next multiple; 1 where no step is known. `peak_gops` is as in `Chip`.
    """

    name: Word
    kind: Slug
    width_step: Count = 1
    features: tuple[Word, ...] = ()
    peak_gops: dict[Precision, Amount] = {}


class RuntimeSupport(Profile, frozen=True, kw_only=True):
    """A runtime on this chip: which unit it drives, in which precisions, at which channel multiple.

    `threads` is where to start: one for each big core, or 1 where an accelerator does the work.
    `licence` names terms that a person must accept before this runtime is used; empty for none.
    """

    name: Slug
    unit: Slug = CPU
    channel_multiple: Count = 1
    precisions: tuple[Precision, ...] = ("float32",)
    threads: Count = 1
    licence: str = ""


class Chip(Profile, frozen=True, kw_only=True):
    """One system on chip, processor or card.

    `features` are the CPU's, common to all its cores. `peak_gops` maps a precision to the CPU's peak rate
    in 10^9 operations a second (a multiply-add is two). `runtimes` stand in order of preference. `facts`
    maps the path of a field ("memory.bandwidth_gb_s", "runtimes.executorch.channel_multiple") to its source.
    """

    name: Slug
    title: Word
    soc: tuple[Word, ...] = ()
    architecture: Word
    features: tuple[Word, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    memory: Memory = Memory()
    peak_gops: dict[Precision, Amount] = {}
    accelerators: tuple[Accelerator, ...] = ()
    runtimes: Annotated[tuple[RuntimeSupport, ...], msgspec.Meta(min_length=1)]
    facts: dict[str, Fact] = {}

    def __post_init__(self) -> None:
        _unique("accelerator kind", [accelerator.kind for accelerator in self.accelerators])
        _unique("runtime", [runtime.name for runtime in self.runtimes])
        units = [CPU, *(accelerator.kind for accelerator in self.accelerators)]
        for runtime in self.runtimes:
            if runtime.unit not in units:
                raise ValueError(
                    f"runtime {runtime.name} drives unit {runtime.unit!r}; this chip has {', '.join(units)}"
                )
        for path, number in numbers(self).items():
            if not math.isfinite(number):
                raise ValueError(f"{path} is {number}; expected a finite number")

    @property
    def cores(self) -> int:
        """CPU cores over all clusters."""
        return sum(cluster.cores for cluster in self.clusters)

    def accelerator(self, runtime: RuntimeSupport) -> Accelerator | None:
        """The unit this runtime drives, None where that is the CPU."""
        return next((unit for unit in self.accelerators if unit.kind == runtime.unit), None)

    def features_for(self, runtime: RuntimeSupport) -> tuple[str, ...]:
        """What the unit that this runtime drives can do."""
        unit = self.accelerator(runtime)
        return self.features if unit is None else unit.features

    def peak_for(self, runtime: RuntimeSupport) -> dict[Precision, Amount]:
        """Peak rates of the unit that this runtime drives, in 10^9 operations a second."""
        unit = self.accelerator(runtime)
        return self.peak_gops if unit is None else unit.peak_gops

    def width_multiple(self, runtime: RuntimeSupport) -> int:
        """What layer widths should be a multiple of: the runtime's multiple and the unit's step together."""
        unit = self.accelerator(runtime)
        return math.lcm(runtime.channel_multiple, unit.width_step if unit else 1)


class Target(Profile, frozen=True, kw_only=True):
    """A device by the name people use; it may be sold with one of several chips.

    `budget` holds the preset for projects that state none, in the units of deploy.toml's [budget].
    """

    name: Slug
    title: Word
    kind: Word
    aliases: tuple[Word, ...] = ()
    chips: Annotated[tuple[Chip, ...], msgspec.Meta(min_length=1)]
    budget: dict[Literal["latency_ms", "size_mb", "peak_memory_mb"], Amount] = {}
    links: tuple[Word, ...] = ()
    notes: tuple[Word, ...] = ()
    is_this_machine: bool = False

    def __post_init__(self) -> None:
        _unique("chip", [chip.name for chip in self.chips])
        for name, limit in self.budget.items():
            if not math.isfinite(limit):
                raise ValueError(f"budget.{name} is {limit}; expected a finite number")


def numbers(chip: Chip) -> dict[str, float]:
    """Every number of a chip that needs a source, by the path that `facts` uses for it."""
    found: dict[str, float] = {f"peak_gops.{key}": rate for key, rate in chip.peak_gops.items()}
    for key in ("size_gb", "bandwidth_gb_s"):
        if (amount := getattr(chip.memory, key)) is not None:
            found[f"memory.{key}"] = amount
    for unit in chip.accelerators:
        found |= {f"accelerators.{unit.kind}.peak_gops.{key}": rate for key, rate in unit.peak_gops.items()}
        if unit.width_step > 1:
            found[f"accelerators.{unit.kind}.width_step"] = unit.width_step
    for runtime in chip.runtimes:
        if runtime.channel_multiple > 1:
            found[f"runtimes.{runtime.name}.channel_multiple"] = runtime.channel_multiple
    return found


def unsourced(chip: Chip) -> list[str]:
    """Paths of the numbers that no fact explains; a fact for a path covers everything below it."""
    return [path for path in numbers(chip) if fact_for(chip, path) is None]


def fact_for(chip: Chip, path: str) -> Fact | None:
    """The fact that explains this path, or the nearest one above it."""
    while path:
        if path in chip.facts:
            return chip.facts[path]
        path = path.rpartition(".")[0]
    return None


def _unique(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} is given twice")
