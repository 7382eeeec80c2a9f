"""The packages that a bundle's runner needs: exact versions from this environment, hashes from the index."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.cache import digest
from deploy.disk import writable
from targets.errors import MissingRequirementError

TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package at its exact version; `sha256` is its file's for this platform."""

    name: str
    version: str
    sha256: str
    file: str


def installed(roots: Sequence[str]) -> dict[str, str]:
    """The versions here of these packages and of all that they need, by canonical name.

    Raises MissingRequirementError for one that is not installed.
    """
    found: dict[str, str] = {}
    waiting = [(name, frozenset[str]()) for name in roots]
    while waiting:
        name, extras = waiting.pop()
        key = canonicalize_name(name)
        try:
            metadata = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingRequirementError(
                "the bundle cannot be locked",
                found=f"no package {name} here",
                expected="the packages that the server will run with",
                fix="pip install 'edge-deploy[serve]', or 'edge-deploy[grpc]' for a bundle with gRPC",
            ) from error
        seen = key in found
        found[key] = metadata.version
        if seen and not extras:
            continue
        for line in metadata.requires or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(environment) for environment in environments):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return dict(sorted(found.items()))


def locked(roots: Sequence[str], cache: Path) -> list[Package]:
    """The packages with the hashes that the package index states for this platform's files.

    Kept in the cache, so that the same environment gives the same lock again, also without a network. Raises
    MissingRequirementError where pip or the index cannot be asked.
    """
    versions = installed(roots)
    key = digest([versions, platform.python_version(), platform.system(), platform.machine()])
    file = cache / "locks" / f"{key}.json"
    if not file.is_file():
        report = _ask_index(versions)
        with writable(cache):
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(report))
            os.replace(scratch, file)
    return [Package(**entry) for entry in json.loads(file.read_text())]


def requirements_txt(packages: Sequence[Package]) -> str:
    """requirements.txt for `pip install --require-hashes`."""
    head = (
        f"# Locked for Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} on "
        f"{platform.system()} {platform.machine()}: pip install --require-hashes -r requirements.txt\n"
    )
    lines = [f"{each.name}=={each.version} \\\n    --hash=sha256:{each.sha256}\n" for each in packages]
    return head + "".join(lines)


def _ask_index(versions: dict[str, str]) -> list[dict[str, str]]:
    wanted = [f"{name}=={_public(version)}" for name, version in versions.items()]
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
        "--disable-pip-version-check", "--only-binary", ":all:", "--report", "-", *wanted,
    ]  # fmt: skip
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unlocked(str(error)) from error
    if ended.returncode:
        raise _unlocked((ended.stderr.strip().splitlines() or ["pip failed"])[-1])
    packages = []
    for entry in json.loads(ended.stdout)["install"]:
        info = entry["download_info"]
        packages.append(
            {
                "name": str(canonicalize_name(entry["metadata"]["name"])),
                "version": entry["metadata"]["version"],
                "sha256": _sha256(info["archive_info"]),
                "file": re.sub(r"[?#].*", "", info["url"]).rpartition("/")[2],
            }
        )
    return sorted(packages, key=lambda each: each["name"])


def _sha256(archive: dict[str, object]) -> str:
    hashes = archive.get("hashes")
    if isinstance(hashes, dict) and "sha256" in hashes:
        return str(hashes["sha256"])
    return str(archive["hash"]).partition("=")[2]


def _public(version: str) -> str:
    """The version without its local label."""
    return version.partition("+")[0]


def _unlocked(reason: str) -> MissingRequirementError:
    return MissingRequirementError(
        "the hashes of the server's packages cannot be had",
        found=reason[:300],
        expected="pip, and a package index that answers",
        fix="bundle where pip can reach the index; the lock is kept in the cache for later bundles",
    )
