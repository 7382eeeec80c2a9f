"""The same model laid out for other model servers: Triton Inference Server and OpenVINO Model Server."""

import json
from pathlib import Path

from deploy.bundling.writing import Content
from deploy.manifest import Input, Manifest, Output

TRITON = {"onnxruntime": ("onnxruntime", "model.onnx"), "openvino": ("openvino", "model.xml")}
TRITON_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}


def triton_takes(manifest: Manifest) -> bool:
    """Whether Triton has a place for every tensor: it knows no scalars where nothing counts samples."""
    return _batched(manifest) or all(_shapes(manifest))


def triton_files(build: Path, manifest: Manifest) -> dict[str, Content]:
    """A model repository: NAME/config.pbtxt and NAME/1/ with the program.

    https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
    """
    backend, _ = TRITON[manifest.runtime]
    files: dict[str, Content] = {f"{manifest.model}/config.pbtxt": _config(manifest, backend).encode()}
    return files | {f"{manifest.model}/1/{name}": file for name, file in _programs(build, manifest).items()}


def ovms_files(build: Path, manifest: Manifest) -> dict[str, Content]:
    """config.json and NAME/1/ with the program; OpenVINO Model Server reads both ONNX and IR.

    https://docs.openvino.ai/2025/model-server/ovms_docs_serving_model.html
    """
    threads = manifest.recommended.threads
    entry = {
        "name": manifest.model,
        "base_path": f"/models/{manifest.model}",
        "target_device": "CPU",
        "plugin_config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
    }
    config = json.dumps({"model_config_list": [{"config": entry}]}, indent=1) + "\n"
    files: dict[str, Content] = {"config.json": config.encode()}
    return files | {f"{manifest.model}/1/{name}": file for name, file in _programs(build, manifest).items()}


def _programs(build: Path, manifest: Manifest) -> dict[str, Path]:
    """The program under the name that the servers look for, and its weights where it looks for them."""
    roles = ("program", "weights")
    files = [build / file.path for file in manifest.files if file.role in roles]
    return {f"model{file.suffix}" if file.stem == files[0].stem else file.name: file for file in files}


def _batched(manifest: Manifest) -> bool:
    return all(shape[:1] == ["batch"] for shape in _shapes(manifest))


def _shapes(manifest: Manifest) -> list[list[int | str]]:
    return [entry.shape for entry in manifest.inputs] + [entry.shape for entry in manifest.outputs]


def _config(manifest: Manifest, backend: str) -> str:
    batched = _batched(manifest)
    rows = manifest.inputs[0].dynamic.get("batch", [1, 1])[1] if batched else 0
    lines = [
        f"name: {_quoted(manifest.model)}",
        f"backend: {_quoted(backend)}",
        f"max_batch_size: {rows}",
    ]
    for kind, entries in (("input", manifest.inputs), ("output", manifest.outputs)):
        lines.append(f"{kind} [")
        lines.append(",\n".join(_tensor(entry, batched) for entry in entries))
        lines.append("]")
    shared = manifest.recommended.shared_rows or 1
    if batched and shared > 1:
        lines.append(f"dynamic_batching {{ preferred_batch_size: [ {shared} ] }}")
    lines.append("instance_group [ { kind: KIND_CPU, count: 1 } ]")
    return "\n".join(lines) + "\n"


def _tensor(entry: Input | Output, batched: bool) -> str:
    shape = entry.shape[1:] if batched else entry.shape
    sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in shape)
    # Triton takes no tensor without dimensions: a number is one of one, and takes another shape on the way.
    dims = f"dims: [ {sizes} ]" if shape else "dims: [ 1 ], reshape: { shape: [ ] }"
    return f"  {{ name: {_quoted(entry.name)}, data_type: {TRITON_TYPES[entry.dtype]}, {dims} }}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
