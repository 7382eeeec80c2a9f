"""What this machine and installation are, without importing the heavy packages."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

from deploy.manifest import Environment, Machine
from targets.detect import detect_host

PACKAGES = (
    "edge-deploy",
    "torch",
    "executorch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "torchao",
    "torch-pruning",
    "numpy",
    "safetensors",
    "transformers",
)
OWN_PACKAGES = ("targets", "calibration", "exporters", "deploy")


def version(package: str) -> str | None:
    """The installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The installed ones among these distributions."""
    return {name: found for name in packages if (found := version(name))}


def environment() -> Environment:
    """What a build ran on."""
    return Environment(
        packages=versions(),
        python=platform.python_version(),
        os=platform.platform(),
        cpu=cpu_name(),
    )


@functools.cache
def cpu_name() -> str:
    """The processor as it calls itself."""
    return detect_host().chips[0].title


def this_machine() -> Machine:
    """Where a latency was measured, when it was measured here."""
    return Machine(kind="host", name="this machine", cpu=cpu_name())


@functools.cache
def own_code() -> str:
    """SHA-256 of this installation's own files, so that a new version never reads old results."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in OWN_PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            if "cli" not in file.parts and "reporting" not in file.parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()
