"""`deploy bundle --for server`: a folder that installs and serves a build without torch."""

import importlib.resources
import platform
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.builds import GOLDEN, check_files
from deploy.bundling.closure import closure
from deploy.bundling.material import licences, sbom
from deploy.bundling.modelserver import ovms_files, triton_files, triton_takes
from deploy.bundling.requirements import Package, locked, requirements_txt
from deploy.bundling.writing import Content
from deploy.manifest import Manifest, read
from exporters.base import EXPORTERS, Entry
from exporters.cache_root import cache_root
from targets.errors import MissingRequirementError

Announce = Callable[[str], None]

SERVING = ("starlette", "uvicorn", "httptools", "uvloop", "prometheus-client", "msgspec", "numpy", "click")
GRPC = ("grpcio", "protobuf")
ROOTS = ("deploy.cli.serve", "deploy.serving.server", "deploy.serving.openapi", "deploy.serving.loading")
PAGES = ("page.html", "page.js", "page.css")
INITS = ("targets", "calibration", "exporters", "deploy", "deploy/cli", "deploy/serving")


def server_bundle(
    build: Path, announce: Announce = lambda text: None, *, grpc: bool = False
) -> dict[str, Content]:
    """The bundle's files by their paths in it; its requirements have gRPC's packages where that is wanted.

    Raises IntegrityError for a damaged build, and MissingRequirementError for a build whose runtime needs
    torch, or where the package index cannot be asked for hashes.
    """
    manifest = read(build)
    check_files(build, manifest)
    entry = EXPORTERS.get(manifest.runtime)
    if entry is None or not entry.serves:
        serving = ", ".join(name for name, each in EXPORTERS.items() if each.serves)
        raise MissingRequirementError(
            f"{manifest.model} for {manifest.target} cannot be bundled for a server",
            found=f"the runtime {manifest.runtime}, which {_why_not(entry)}",
            expected=f"a build for one of {serving}",
            fix=f"deploy build --target host --runtime {serving.partition(', ')[0]}, then bundle that",
        )
    announce("asking the package index for hashes")
    packages = locked([*SERVING, *(GRPC if grpc else ()), *entry.runs_on], cache_root())
    files = _model_files(build, manifest)
    files |= _runner_files(manifest.runtime)
    files |= _written(manifest, packages)
    files |= {f"licences/{name}": content for name, content in licences(packages).items()}
    files["sbom.cdx.json"] = sbom(manifest, packages)
    if triton_takes(manifest):
        files |= {f"triton/{name}": content for name, content in triton_files(build, manifest).items()}
    else:
        announce("no layout for Triton, which takes no scalar from a model without a batch")
    files |= {f"ovms/{name}": content for name, content in ovms_files(build, manifest).items()}
    return files


def _why_not(entry: Entry | None) -> str:
    if entry is None:
        return "this version does not know"
    return "runs apart, under a licence that is not for production" if entry.isolated else "needs torch"


def _model_files(build: Path, manifest: Manifest) -> dict[str, Content]:
    names = [*(file.path for file in manifest.files), *GOLDEN, "manifest.json"]
    return {f"model/{name}": build / name for name in names}


def _runner_files(runtime: str) -> dict[str, Content]:
    module = EXPORTERS[runtime].attribute.partition(":")[0]
    files: dict[str, Content] = {f"runner/{name}/__init__.py": b"" for name in INITS}
    files |= {
        f"runner/{place}": file
        for place, file in closure([*ROOTS, module]).items()
        if not place.endswith("__init__.py")
    }
    pages = importlib.resources.files("deploy.serving")
    files |= {f"runner/deploy/serving/{name}": pages.joinpath(name).read_bytes() for name in PAGES}
    return files


def _written(manifest: Manifest, packages: list[Package]) -> dict[str, Content]:
    unit = re.sub(r"[^a-z0-9]+", "-", manifest.model.lower()).strip("-")[:50] or "model"
    words = {
        "model": manifest.model,
        "target": manifest.target,
        "rung": manifest.shipped_rung,
        "runtime": manifest.runtime,
        "threads": str(manifest.recommended.threads),
        "unit": unit,
        "platform": f"Python 3.11 on {platform.system()} {platform.machine()}",
    }
    return {
        "README.md": _template("README.md", words),
        "serve.py": _template("serve.py", words),
        "selftest.py": _template("selftest.py", words),
        "requirements.txt": requirements_txt(packages).encode(),
        f"edge-deploy-{unit}.service": _template("service", words),
        "Containerfile": _template("Containerfile", words),
        "kubernetes.yaml": _template("kubernetes.yaml", words),
    }


def _template(name: str, words: Mapping[str, str]) -> bytes:
    text = importlib.resources.files("deploy.bundling").joinpath("templates", f"{name}.txt").read_text()
    return string.Template(text).substitute(words).encode()
