"""The OpenAPI document of a service."""

from typing import Any

from deploy.serving.protocol import shape_text
from deploy.serving.service import Service

ERROR = {
    "description": "What is wrong, and the field.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def document(service: Service) -> dict[str, Any]:
    """OpenAPI 3.1 for the models that are open."""
    paths: dict[str, Any] = {
        "/v2/health/live": _get("Whether the process answers."),
        "/v2/health/ready": _get("Whether all models are open and the server stays up.", {"503": ERROR}),
        "/v2": _get("The server's name, version and extensions."),
        "/v2/repository/index": {"post": _operation("The models that are open.")},
        "/metrics": _get("Prometheus's text format."),
    }
    for model in service.models.values():
        loaded = model.loaded
        base = f"/v2/models/{loaded.name}"
        paths[base] = _get("Inputs and outputs.")
        paths[f"{base}/ready"] = _get("Whether the model is open.")
        paths[f"{base}/example"] = _get("A request that works.")
        shapes = ", ".join(f"{spec.name} {shape_text(spec)} {spec.dtype}" for spec in loaded.specs)
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}}
        body = {"required": True, "content": content}
        operation = _operation(f"Infers. Inputs: {shapes}.", {"400": ERROR, "413": ERROR, "429": ERROR})
        paths[f"{base}/infer"] = {"post": {**operation, "requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Open Inference Protocol v2", "version": "2"},
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _get(summary: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"get": _operation(summary, more)}


def _operation(summary: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "The answer."}, **(more or {})}}


_SHAPE = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": _SHAPE,
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}
SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "properties": {"error": {"type": "string"}, "field": {"type": "string"}},
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": _TENSOR},
            "outputs": {"type": "array", "items": {"type": "object"}},
        },
    },
}
