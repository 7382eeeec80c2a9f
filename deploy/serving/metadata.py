"""What a service says of itself and its models, in the words of the protocol, whatever carries them."""

from collections.abc import Sequence
from typing import Any

from deploy.manifest import Input, Output
from deploy.serving.loading import Loaded
from deploy.serving.protocol import DATATYPES
from deploy.serving.service import Service


def of_server(service: Service, extensions: Sequence[str]) -> dict[str, Any]:
    """Name, version and extensions."""
    packages = next(iter(service.models.values())).loaded.manifest.environment.packages
    version = packages.get("edge-deploy", "")
    return {"name": "edge-deploy", "version": version, "extensions": list(extensions)}


def of_models(service: Service) -> list[dict[str, str]]:
    """The repository's index."""
    models = [model.loaded for model in service.models.values()]
    return [{"name": m.name, "version": m.version, "state": "READY", "reason": ""} for m in models]


def of_model(loaded: Loaded) -> dict[str, Any]:
    """A model's inputs and outputs; dynamic dimensions are -1."""
    manifest = loaded.manifest
    return {
        "name": loaded.name,
        "versions": [loaded.version],
        "platform": f"edge-deploy_{manifest.runtime}",
        "inputs": [_tensor(entry) for entry in manifest.inputs],
        "outputs": [_tensor(entry) for entry in manifest.outputs],
    }


def _tensor(entry: Input | Output) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in entry.shape]
    return {"name": entry.name, "datatype": DATATYPES[entry.dtype], "shape": shape}
