"""What a bundle says of its parts: a CycloneDX SBOM, and the licence texts of the packages in it."""

import importlib.metadata
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bundling.requirements import Package
from deploy.manifest import Manifest

LICENCE = re.compile(r"(^|/)(licen[sc]e|copying|notice)[^/]*$", re.IGNORECASE)
LARGEST_TEXT = 1 << 20
NAMESPACE = uuid.UUID("7f9d6a52-6d57-5d3c-9a53-0c2f4d1b8e11")
"""Of the serial numbers: one content has one number."""


def sbom(manifest: Manifest, packages: Sequence[Package]) -> bytes:
    """A CycloneDX 1.6 document (https://cyclonedx.org/docs/1.6/json), without times and so repeatable."""
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.model,
        "version": manifest.files[0].sha256[:12],
        "hashes": [{"alg": "SHA-256", "content": manifest.files[0].sha256}],
    }
    components = [_component(package) for package in packages]
    body: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": [each["bom-ref"] for each in components]}],
    }
    number = uuid.uuid5(NAMESPACE, json.dumps(body, sort_keys=True))
    return (json.dumps({"serialNumber": f"urn:uuid:{number}", **body}, indent=1) + "\n").encode()


def licences(packages: Sequence[Package]) -> dict[str, bytes]:
    """The licence files that the packages carry, as NAME-VERSION/FILE; one line where they carry none."""
    files: dict[str, bytes] = {}
    for package in packages:
        folder = f"{package.name}-{package.version}"
        texts = list(_texts(package.name))
        for name, text in texts:
            files[f"{folder}/{name}"] = text
        if not texts:
            stated = _stated(package.name) or "nothing"
            files[f"{folder}/LICENCE"] = (
                f"The package carries no text; its metadata states {stated}.\n".encode()
            )
    own = Path(__file__).parents[2] / "LICENSE"
    text = own.read_bytes() if own.is_file() else dict(_texts("edge-deploy")).get("LICENSE", b"Apache-2.0\n")
    return {**files, "edge-deploy/LICENSE": text}


def _component(package: Package) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{package.name}@{package.version}",
        "name": package.name,
        "version": package.version,
        "purl": f"pkg:pypi/{package.name}@{package.version}",
        "hashes": [{"alg": "SHA-256", "content": package.sha256}],
    }
    if stated := _stated(package.name):
        component["licenses"] = [{"license": {"name": stated}}]
    return component


def _texts(name: str) -> list[tuple[str, bytes]]:
    found = []
    for file in importlib.metadata.files(name) or []:
        path = Path(str(file.locate()))
        named = ".dist-info" in str(file) and LICENCE.search(str(file))
        if named and path.is_file() and path.stat().st_size <= LARGEST_TEXT:
            found.append((path.name, path.read_bytes()))
    return sorted(dict(found).items())


def _field(metadata: Any, name: str) -> str:
    return str(metadata[name]) if name in metadata else ""


def _stated(name: str) -> str:
    metadata = importlib.metadata.metadata(name)
    stated = _field(metadata, "License-Expression") or _field(metadata, "License")
    if not stated or "\n" in stated.strip():
        classifiers = metadata.get_all("Classifier") or []
        stated = next((each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License")), "")
    return str(stated).strip()
