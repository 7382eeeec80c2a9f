"""`deploy doctor`: what this machine and installation can do, and the fix for each lack.

Nothing heavy is imported: packages are looked up by their metadata. Only a deep diagnosis loads torch,
lowers a two-layer model with each exporter and runs it.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from deploy import extras
from deploy.cache import folder_size
from deploy.environment import cpu_name, version
from deploy.extras import Requirement
from deploy.manifest import Value
from deploy.planner import TERMS
from exporters.base import EXPORTERS, at_hand
from exporters.cache_root import cache_root
from exporters.isolated.environment import ENVIRONMENTS
from targets.catalog import all_targets
from targets.errors import DeployError, MissingRequirementError

Severity = Literal["broken", "warning", "optional", "ok"]
SEVERITIES: tuple[Severity, ...] = ("broken", "warning", "optional", "ok")

TRIED_HOSTS = (("Linux", "x86_64"),)
LITTLE_DISK_BYTES = 2e9  # a build of a 100 MB model with its rungs fits several times
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")

# Package -> (variables of which one turns its reports off, what to do); no variable: only the command does.
TELEMETRY: dict[str, tuple[tuple[str, ...], str]] = {
    "huggingface_hub": (
        ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE"),
        "export HF_HUB_DISABLE_TELEMETRY=1",
    ),
    "openvino-telemetry": ((), "opt_in_out --opt_out"),
}

Announce = Callable[[str], None]


class Finding(Value, frozen=True, kw_only=True):
    """One thing that was looked at.

    broken: no build works until it is fixed. warning: it works, but not as tried or asked. optional:
    absent, and needed only for what `found` says. `fix` is null where there is nothing to do.
    """

    area: str
    name: str
    severity: Severity
    found: str
    expected: str | None = None
    fix: str | None = None


class Diagnosis(Value, frozen=True, kw_only=True):
    """All findings, the worst first, and the runtimes that builds can use here."""

    findings: list[Finding]
    usable: list[str]
    deep: bool

    @property
    def exit_code(self) -> int:
        """0, or 3 when something keeps every build from working."""
        broken = any(finding.severity == "broken" for finding in self.findings)
        return MissingRequirementError.exit_code if broken else 0


def diagnose(*, deep: bool = False, announce: Announce = lambda text: None) -> Diagnosis:
    """Looks at everything; `deep` also lowers and runs a two-layer model with each exporter."""
    wanted = _requirements()
    runtimes, usable = _runtimes(wanted, deep, announce)
    looked_at = (
        _python(),
        _host(),
        _packages(wanted),
        runtimes,
        _planned_runtimes(),
        _sdks(),
        _licences(wanted),
        _cache(cache_root()),
        _threads(),
        _telemetry(),
    )
    findings = [finding for group in looked_at for finding in group]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(findings=findings, usable=usable, deep=deep)


def usable_cores() -> int:
    """CPU cores that this process may use: by affinity, and by the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _requirements() -> tuple[Requirement, ...]:
    try:
        return extras.requirements()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _python() -> Iterator[Finding]:
    found = platform.python_version()
    try:
        wanted = importlib.metadata.metadata(extras.DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            area="environment",
            name=extras.DISTRIBUTION,
            severity="broken",
            found="not installed: these files run without their package",
            fix="pip install -e '.[all]' in the project's folder",
        )
        return
    fits = extras.fits(found, wanted)
    yield Finding(
        area="environment",
        name="python",
        severity="ok" if fits else "broken",
        found=f"{found} ({sys.executable})",
        expected=wanted,
        fix=None if fits else "python3.11 -m venv .venv, and install there: see docs/platforms.md",
    )


def _host() -> Iterator[Finding]:
    system, machine = platform.system(), platform.machine()
    if find_spec("fcntl") is None:
        yield Finding(
            area="environment",
            name="host",
            severity="broken",
            found=f"{system} {machine} cannot lock a build's folder (no fcntl)",
            fix="build on Linux, or in WSL2, which was not tried: see docs/platforms.md",
        )
        return
    tried = (system, machine) in TRIED_HOSTS
    yield Finding(
        area="environment",
        name="host",
        severity="ok" if tried else "warning",
        found=f"{system} {machine}, {cpu_name()}",
        expected=None if tried else ", ".join(" ".join(host) for host in TRIED_HOSTS),
        fix=None if tried else "this host was not tried: docs/platforms.md says what its packages offer",
    )


def _packages(wanted: tuple[Requirement, ...]) -> Iterator[Finding]:
    for requirement in wanted:
        yield _package(requirement)


def _package(wanted: Requirement) -> Finding:
    found = version(wanted.name)
    extra = f" (extra {wanted.extra})" if wanted.extra else ""
    if found is None:
        return Finding(
            area="packages",
            name=wanted.name,
            severity="optional" if wanted.extra else "broken",
            found=f"not installed{extra}",
            expected=wanted.specifier,
            fix=_pip_extra(wanted.extra),
        )
    fits = extras.fits(found, wanted.specifier)
    return Finding(
        area="packages",
        name=wanted.name,
        severity="ok" if fits else "warning",
        found=f"{found}{extra}",
        expected=wanted.specifier,
        fix=None if fits else f"pip install '{wanted.name}{wanted.specifier}'",
    )


def _pip_extra(extra: str) -> str:
    return f"pip install '{extras.DISTRIBUTION}{f'[{extra}]' if extra else ''}'"


def _runtimes(
    wanted: tuple[Requirement, ...], deep: bool, announce: Announce
) -> tuple[list[Finding], list[str]]:
    """A finding for each exporter, and those that work. One that does not is broken where none works."""
    findings = {name: _runtime(name, wanted, deep, announce) for name in EXPORTERS}
    usable = [name for name, finding in findings.items() if finding.severity == "ok"]
    lacking: Severity = "optional" if usable else "broken"
    return [
        finding if finding.severity == "ok" else _as(finding, lacking) for finding in findings.values()
    ], usable


def _as(finding: Finding, severity: Severity) -> Finding:
    import msgspec

    return msgspec.structs.replace(finding, severity=severity)


def _runtime(name: str, wanted: tuple[Requirement, ...], deep: bool, announce: Announce) -> Finding:
    entry = EXPORTERS[name]
    needed = [requirement for requirement in wanted if requirement.extra == entry.extra]
    absent = [package for package in entry.packages if find_spec(package) is None]
    absent += [r.name for r in needed if version(r.name) is None and r.name not in absent]
    others = [
        f"{r.name} {found} instead of {r.specifier}"
        for r in needed
        if (found := version(r.name)) and not extras.fits(found, r.specifier)
    ]
    if entry.isolated and not absent and not at_hand(name):
        return _unusable(name, "not for this machine", "another runtime")
    if entry.isolated and not absent and not ENVIRONMENTS[name].python.exists():
        return Finding(
            area="runtimes",
            name=name,
            severity="optional",
            found="its environment is made by the first build that accepts its licence",
            fix=f"read the terms, then deploy build --accept-license {name}",
        )
    if absent:
        return _unusable(name, f"not installed: {', '.join(absent)}", _pip_extra(entry.extra))
    if deep:
        return _tried(name, announce)
    if others:
        return _unusable(name, f"versions not tried together: {', '.join(others)}", _pip_extra(entry.extra))
    return Finding(
        area="runtimes",
        name=name,
        severity="ok",
        found="installed, with the versions that work together; --deep runs a model",
    )


def _unusable(name: str, found: str, fix: str) -> Finding:
    return Finding(area="runtimes", name=name, severity="broken", found=found, fix=fix)


def _tried(name: str, announce: Announce) -> Finding:
    announce(f"{name}: lowering and running a two-layer model")
    reinstall = f"pip install --force-reinstall '{extras.DISTRIBUTION}[{EXPORTERS[name].extra}]'"
    try:
        from deploy.trial import try_exporter

        trial = try_exporter(name)
    except DeployError as error:
        return _unusable(name, error.message, reinstall)
    except Exception as error:  # a library that cannot be loaded raises whatever it likes
        return _unusable(name, f"{type(error).__name__}: {error}", reinstall)
    return Finding(
        area="runtimes",
        name=name,
        severity="ok",
        found=f"a two-layer model was lowered and ran in {trial.seconds:.0f} s, {trial.snr_db:.0f} dB",
    )


def _planned_runtimes() -> Iterator[Finding]:
    chips = [chip for target in all_targets() for chip in target.chips]
    known = dict.fromkeys(runtime.name for chip in chips for runtime in chip.runtimes)
    without = sorted(name for name in known if name not in EXPORTERS)
    if without:
        yield Finding(
            area="runtimes",
            name="plans only",
            severity="optional",
            found=f"{', '.join(without)}: in the catalogue; this version plans for them and builds none",
        )


def _sdks() -> Iterator[Finding]:
    yield Finding(
        area="sdks", name="executorch", severity="ok", found="needs no SDK: XNNPACK comes with its package"
    )
    adb = shutil.which("adb")
    yield Finding(
        area="sdks",
        name="adb",
        severity="ok" if adb else "optional",
        found=adb or "not found; only measuring on a phone needs it",
        fix=None if adb else "install Android's platform-tools (Debian and Ubuntu: apt install adb)",
    )
    yield _qnn(os.environ.get("QNN_SDK_ROOT"))


def _qnn(root: str | None) -> Finding:
    missing = bool(root) and not Path(root or "").is_dir()
    return Finding(
        area="sdks",
        name="QNN_SDK_ROOT",
        severity="warning" if missing else "ok" if root else "optional",
        found=f"{root} is no folder" if missing else root or "not set; only the Qualcomm NPU needs it",
        fix="point QNN_SDK_ROOT at the unpacked SDK, or unset it" if missing else None,
    )


def _licences(wanted: tuple[Requirement, ...]) -> Iterator[Finding]:
    for name, terms in TERMS.items():
        yield Finding(
            area="licences",
            name=name,
            severity="ok",
            found=f"{terms}; never used before it is accepted",
            fix=f"read them, then --accept-license {name}",
        )
    stated = [f"{r.name}: {text}" for r in wanted if (text := _licence(r.name))]
    yield Finding(
        area="licences",
        name="packages",
        severity="ok",
        found="; ".join(stated) or "no package of the extras is installed",
    )


def _licence(package: str) -> str | None:
    """What an installed package's metadata says about its licence, in a line."""
    if version(package) is None:
        return None
    metadata = importlib.metadata.metadata(package)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    text = metadata["License-Expression"] or ", ".join(classifiers) or (metadata["License"] or "").strip()
    return text.splitlines()[0] if text else "not stated"


def _cache(root: Path) -> Iterator[Finding]:
    place = next((path for path in (root, *root.parents) if path.exists()), root)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free
    except OSError as error:
        yield Finding(
            area="cache",
            name="folder",
            severity="broken",
            found=f"{root}: {error.strerror}",
            expected="a folder that may be written to",
            fix="set EDGE_DEPLOY_CACHE to one",
        )
        return
    size = folder_size(root) if root.is_dir() else 0
    yield Finding(area="cache", name="folder", severity="ok", found=f"{root}, {size / 1e6:.0f} MB")
    enough = free >= LITTLE_DISK_BYTES
    yield Finding(
        area="cache",
        name="disk",
        severity="ok" if enough else "warning",
        found=f"{free / 1e9:.1f} GB free",
        expected=f"at least {LITTLE_DISK_BYTES / 1e9:g} GB",
        fix=None
        if enough
        else "free space, deploy cache prune --all, or set EDGE_DEPLOY_CACHE to another disk",
    )


def _threads() -> Iterator[Finding]:
    cores, here = usable_cores(), os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    too_many = asked.isdigit() and int(asked) > cores
    yield Finding(
        area="threads",
        name="cores",
        severity="warning" if too_many else "ok",
        found=f"{cores} of {here} usable, OMP_NUM_THREADS {asked or 'not set'}",
        expected=f"at most {cores} threads" if too_many else None,
        fix=f"export OMP_NUM_THREADS={cores}" if too_many else None,
    )


def _telemetry() -> Iterator[Finding]:
    yield Finding(area="privacy", name=extras.DISTRIBUTION, severity="ok", found="sends nothing")
    for package, (variables, fix) in TELEMETRY.items():
        if version(package) is None:
            continue
        off = next((name for name in variables if os.environ.get(name)), None)
        yield Finding(
            area="privacy",
            name=package,
            severity="ok" if off else "optional",
            found=f"off by {off}" if off else "may report its use when it goes online",
            fix=None if off else fix,
        )
