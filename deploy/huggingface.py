"""A Hugging Face folder as a model: config.json and safetensors. Nothing is fetched, no code of it runs."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cache import file_digest
from targets.errors import MissingRequirementError, ModelError, UsageError, first_line

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
LARGEST_CONFIG_BYTES = 16 << 20
SEQUENCE = 128
PICTURE = 224
MOST_BATCH = 8
SHOWN = 5
ATTENTION = "eager"
"""Matrix products and a softmax written out. "sdpa" exports too, but becomes more operators outside the
delegate: a 3-layer BERT took 1.9 times as long in XNNPACK, a 3-layer ViT 1.1 times."""


def is_folder(path: Path) -> bool:
    """Whether this is a folder as `save_pretrained` leaves it."""
    return path.is_dir() and (path / CONFIG).is_file()


def default_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables [inputs.NAME] that the configuration implies; reads config.json alone, imports nothing.

    Token models: input_ids and attention_mask, int64, ("batch", 128). Picture models: pixel_values,
    float32, ("batch", channels, height, width). Raises UsageError where the configuration is neither.
    """
    config = read_config(folder)
    bounds = {"batch": {"min": 1, "max": MOST_BATCH}}
    if isinstance(config.get("vocab_size"), int) and "image_size" not in config:
        shape = ["batch", _sequence(config)]
        table = {"shape": shape, "dtype": "int64", "dynamic": bounds}
        return {"input_ids": table, "attention_mask": dict(table)}
    if "image_size" in config or "num_channels" in config:
        channels = config.get("num_channels", 3)
        shape = ["batch", channels if isinstance(channels, int) else 3, *_picture(config, folder)]
        return {"pixel_values": {"shape": shape, "dtype": "float32", "dynamic": bounds}}
    raise UsageError(
        f"{folder.name} does not say what its inputs are",
        found=f"model_type {config.get('model_type')!r} with neither vocab_size nor image_size",
        expected="a table [inputs.NAME] for each input of the model",
        fix='for example [inputs.input_ids] shape = ["batch", 128], dtype = "int64"',
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises UsageError when it is missing and ModelError when it is damaged."""
    file = folder / CONFIG
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_CONFIG_BYTES + 1)
        config = json.loads(content) if len(content) <= LARGEST_CONFIG_BYTES else None
    except OSError as error:
        raise UsageError(
            f"{folder.name} holds no {CONFIG}", found=error.strerror, expected="a folder of save_pretrained"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(config, dict):
        raise _damaged(folder, ValueError("no table of settings"))
    return config


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the configuration and all weights."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def load_folder(folder: Path) -> "nn.Module":
    """The model in float32 and evaluation mode, its outputs a dictionary without caches.

    Never fetches anything and never runs code of the folder; reads safetensors only. Raises
    MissingRequirementError without transformers, ModelError for weights that do not fit or a model that
    transformers does not know.
    """
    _check_folder(folder)
    _require_transformers()
    with _offline(), _silent():
        try:
            module, loading = _from_pretrained(folder)
        except (ModelError, KeyboardInterrupt):
            raise
        except BaseException as error:  # parsers' own classes of error; a panic in Rust is no Exception
            raise _unloadable(folder, error) from error
    _check_fit(folder, loading)
    config: Any = module.config
    config.use_cache, config.return_dict = False, True
    module.eval()
    return module


def _check_folder(folder: Path) -> None:
    config = read_config(folder)
    if "quantization_config" in config:
        raise ModelError(
            f"{folder.name} is quantized already",
            found=f"quantization_config in {CONFIG}",
            expected="float weights, which are quantized here",
            fix="name the folder of the float model",
        )
    if not any(folder.glob("*.safetensors")):
        other = [file.name for kind in ("*.bin", "*.pt", "*.h5", "*.msgpack") for file in folder.glob(kind)]
        raise ModelError(
            f"{folder.name} holds no safetensors",
            found=", ".join(sorted(other)[:SHOWN]) or "no weights",
            expected="model.safetensors, or its shards with their index",
            fix="load it where you trust it and save it with save_pretrained",
        )


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise MissingRequirementError(
            "a Hugging Face folder cannot be loaded",
            found="no package transformers",
            expected="the extra 'transformers'",
            fix="pip install 'edge-deploy[transformers]'",
        )


def _from_pretrained(folder: Path) -> "tuple[nn.Module, Mapping[str, Any]]":
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = list(getattr(config, "architectures", None) or [])
    own = getattr(transformers, str(names[0]), None) if names else None
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    # AutoModel checks auto_map, which names code of the folder; a class of the library has no such code.
    chosen: Any = own if is_model else transformers.AutoModel
    extra = {} if is_model else {"trust_remote_code": False}
    loaded: tuple[nn.Module, Mapping[str, Any]] = chosen.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation=ATTENTION,
        dtype=torch.float32,
        output_loading_info=True,
        **extra,
    )
    return loaded


def _check_fit(folder: Path, loading: Mapping[str, Any]) -> None:
    """transformers draws missing weights at random and drops what it does not know; here neither passes."""
    misfits = {
        "missing": loading.get("missing_keys"),
        "of another shape": [str(key[0]) for key in loading.get("mismatched_keys") or ()],
        "not in the model": [
            k for k in loading.get("unexpected_keys") or () if not k.endswith("position_ids")
        ],
    }
    found = "; ".join(f"{what}: {_some(sorted(names))}" for what, names in misfits.items() if names)
    if found:
        raise ModelError(
            f"the weights in {folder.name} do not fit its {CONFIG}",
            found=found,
            expected="the tensors of the architecture it names",
            fix=f"correct architectures in {CONFIG}, or save the model again with save_pretrained",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """HF_HUB_OFFLINE while transformers is imported and loads; the hub's client reads it at import."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps transformers' progress bars and load reports off the screen."""
    from exporters.quiet import quiet

    with quiet():
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                logging.enable_progress_bar()


def _sequence(config: Mapping[str, Any]) -> int:
    """128 tokens, fewer where the model has fewer positions (some keep two of them for padding)."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions >= SEQUENCE + 2:
        return SEQUENCE
    return max(1, positions // 2)


def _picture(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Height and width: of config.json, else of the folder's image processor, else 224."""
    size = _two(config.get("image_size"))
    if size:
        return size
    try:
        processor = json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError):
        return PICTURE, PICTURE
    settings = processor if isinstance(processor, dict) else {}
    return _two(settings.get("crop_size")) or _two(settings.get("size")) or (PICTURE, PICTURE)


def _two(size: object) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) for each in size):
        return size[0], size[1]
    return None


def _damaged(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{folder.name}/{CONFIG} cannot be read",
        found=first_line(error),
        expected="the configuration that save_pretrained wrote",
        fix="save the model again",
    )


def _unloadable(folder: Path, error: BaseException) -> ModelError:
    return ModelError(
        f"transformers cannot load {folder.name}",
        found=first_line(error),
        expected="an architecture of the transformers library, with undamaged safetensors",
        fix="models that bring their own code are not run: write a factory in a .py file for them",
    )
