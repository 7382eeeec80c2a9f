"""Parses what a machine says about itself (cpuinfo, meminfo, getprop) into a profile.

The parsers are pure; only `detect_host` reads this machine. What is plugged in elsewhere is fetched by
deploy/devices and parsed here.
"""

import os
import platform
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from targets.profile import Chip, Cluster, Fact, Memory, Precision, RuntimeSupport, Target

# Linux's name of a CPU flag -> the name that profiles and the truth table use.
X86_FLAGS = {
    name: name
    for name in (
        "sse4_2", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
        "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    )
}  # fmt: skip
ARM_FLAGS = {
    "asimd": "neon", "neon": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16",
    "sve": "sve", "sve2": "sve2", "sme": "sme", "sme2": "sme2",
}  # fmt: skip

# (implementer, part) of MIDR_EL1, from Linux arch/arm64/include/asm/cputype.h and Arm's core manuals.
ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
}

# Android's properties that may name the system on chip, the surest first.
SOC_PROPERTIES = ("ro.soc.model", "ro.hardware.chipname", "ro.board.platform")

MEASURED = "docs/measurements.md: channel widths, x86 with AVX512-VNNI, 2 cores"
XNNPACK = "XNNPACK, https://github.com/google/XNNPACK/tree/master/src/f32-gemm"
XNNPACK_NOTE = (
    "Output tiles of its float32 GEMM microkernels are 8 or 16 wide; measured times grow smoothly with width."
)


def from_cpuinfo(text: str, *, memory_gb: float | None = None, cores: int | None = None) -> Chip:
    """The chip that a /proc/cpuinfo describes, x86 or Arm.

    `cores` caps the threads to start with (a container may use fewer than the machine has). A text that
    says nothing gives a chip without features: whatever is not stated is not there.
    """
    processors = _processors(text)
    x86 = any("flags" in fields for fields in processors)
    flags = _common_flags(processors, "flags" if x86 else "Features")
    features = tuple(
        dict.fromkeys(name for flag, name in (X86_FLAGS if x86 else ARM_FLAGS).items() if flag in flags)
    )
    clusters = _x86_clusters(processors) if x86 else _arm_clusters(processors)
    return _chip(
        title=" + ".join(cluster.name for cluster in clusters) or "unknown CPU",
        architecture="x86_64" if x86 else "arm64",
        features=features,
        clusters=clusters,
        memory_gb=memory_gb,
        cores=cores,
        source="/proc/cpuinfo of this machine",
    )


def memory_gb_from_meminfo(text: str) -> float | None:
    """Size of main memory in 10^9 bytes from /proc/meminfo; None where it says nothing."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(total[1]) * 1024 / 1e9 if total else None


def properties(text: str) -> dict[str, str]:
    """What Android's `getprop` prints, as a mapping."""
    return dict(re.findall(r"^\[([^\]]+)\]: \[([^\]]*)\]", text.replace("\r", ""), re.MULTILINE))


def from_getprop(text: str, targets: Iterable[Target]) -> Target | None:
    """The target whose chip the phone says it has, with that chip alone; None where the catalogue lacks it.

    Several targets may carry the chip: one whose alias is the phone's model number comes first.
    """
    stated = properties(text)
    model = stated.get("ro.product.model", "").casefold()
    ordered = sorted(targets, key=lambda t: model not in {alias.casefold() for alias in t.aliases})
    for key in SOC_PROPERTIES:
        soc = stated.get(key, "").casefold()
        for target in ordered if soc else ():
            for chip in target.chips:
                if soc in {word.casefold() for word in (chip.name, *chip.soc)}:
                    return msgspec.structs.replace(target, chips=(chip,))
    return None


def detect_host() -> Target:
    """This machine as a target called "host"."""
    chip = _host_chip()
    return Target(
        name="host",
        title=f"This machine ({chip.title})",
        kind="host",
        aliases=("this machine", "localhost", "local"),
        chips=(chip,),
        notes=("Detected, not declared: what the operating system does not state is left out.",),
        is_this_machine=True,
    )


def _host_chip() -> Chip:
    cores = usable_cores()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _chip_from_platform(platform.machine(), platform.system(), platform.processor(), cores)
    return from_cpuinfo(cpuinfo, memory_gb=memory_gb_from_meminfo(meminfo), cores=cores)


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chip_from_platform(machine: str, system: str, processor: str, cores: int) -> Chip:
    """macOS and Windows have no /proc: only what holds for every machine of that kind is stated."""
    arm = machine.lower() in ("arm64", "aarch64")
    # Every Apple silicon Mac has at least Armv8.5 (Apple M1), which includes both.
    features = ("neon", "fp16", "dotprod") if arm and system == "Darwin" else ()
    return _chip(
        title=processor or machine or "unknown CPU",
        architecture="arm64" if arm else "x86_64",
        features=features,
        clusters=(Cluster(name=processor or machine or "unknown CPU", cores=cores),),
        memory_gb=None,
        cores=cores,
        source="the operating system of this machine",
    )


def _chip(
    *,
    title: str,
    architecture: str,
    features: tuple[str, ...],
    clusters: tuple[Cluster, ...],
    memory_gb: float | None,
    cores: int | None,
    source: str,
) -> Chip:
    known = sum(cluster.cores for cluster in clusters)
    threads = max(1, min(known or 1, cores or known or 1))
    fact = Fact(source=source)
    facts = {"features": fact, "clusters": fact}
    if memory_gb is not None:
        facts["memory.size_gb"] = Fact(source="/proc/meminfo of this machine")
    runtimes, multiples = _cpu_runtimes(architecture, features, threads)
    return Chip(
        name=re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60].strip("-") or "cpu",
        title=title[:200],
        architecture=architecture,
        features=features,
        clusters=clusters,
        memory=Memory(size_gb=memory_gb),
        runtimes=runtimes,
        facts=facts | multiples,
    )


def _cpu_runtimes(
    architecture: str, features: tuple[str, ...], threads: int
) -> tuple[tuple[RuntimeSupport, ...], dict[str, Fact]]:
    """The runtimes of a general CPU in order of preference, and the sources of their multiples."""
    bfloat16: tuple[Precision, ...] = ("bfloat16",) if {"avx512_bf16", "amx_bf16"} & {*features} else ()
    wide = architecture == "x86_64"
    sparse = ("deepsparse",) if wide and "avx2" in features else ()
    runtimes = (
        RuntimeSupport(
            name="openvino",
            channel_multiple=16 if wide else 8,
            precisions=("float32", *bfloat16, "int8"),
            threads=threads,
        ),
        RuntimeSupport(
            name="onnxruntime",
            channel_multiple=16 if wide else 8,
            precisions=("float32", "int8"),
            threads=threads,
        ),
        RuntimeSupport(
            name="executorch", channel_multiple=8, precisions=("float32", "float16", "int8"), threads=threads
        ),
        *(
            RuntimeSupport(name=name, precisions=("float32", "int8"), threads=threads, licence=name)
            for name in sparse
        ),
    )
    note = "" if wide else "Measured on x86 only; two 128-bit vectors of float32 taken as the step on Arm."
    measured = Fact(source=MEASURED, note=note)
    return runtimes, {
        "runtimes.openvino.channel_multiple": measured,
        "runtimes.onnxruntime.channel_multiple": measured,
        "runtimes.executorch.channel_multiple": Fact(source=XNNPACK, note=XNNPACK_NOTE),
    }


def _processors(text: str) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo that describe a logical processor."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = (line.partition(":") for line in block.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, _, value in lines}
        if "processor" in fields:
            blocks.append(fields)
    return blocks


def _common_flags(processors: list[dict[str, str]], key: str) -> set[str]:
    """Flags that every processor has: a thread may run on any of them."""
    sets = [set(fields.get(key, "").split()) for fields in processors]
    return set.intersection(*sets) if sets else set()


def _x86_clusters(processors: list[dict[str, str]]) -> tuple[Cluster, ...]:
    """One cluster for each model name; hyper-threads of a core count once where the kernel names cores."""
    cores: dict[str, set[tuple[str, str]]] = {}
    for index, fields in enumerate(processors):
        core = (fields.get("physical id", "0"), fields.get("core id", f"processor {index}"))
        cores.setdefault(fields.get("model name") or "x86 CPU", set()).add(core)
    return tuple(Cluster(name=name[:200], cores=len(ids)) for name, ids in cores.items())


def _arm_clusters(processors: list[dict[str, str]]) -> tuple[Cluster, ...]:
    """One cluster for each part number, in the order the kernel lists them."""
    parts = Counter(
        (_number(fields.get("CPU implementer", "")), _number(fields.get("CPU part", "")))
        for fields in processors
    )
    return tuple(Cluster(name=_core_name(*part), cores=count) for part, count in parts.items())


def _core_name(implementer: int, part: int) -> str:
    return ARM_CORES.get((implementer, part), f"Arm core {implementer:#x}/{part:#x}")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0
