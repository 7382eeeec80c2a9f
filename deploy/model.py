"""The user's model ("file.py:factory" with weights, a Hugging Face folder, an ONNX file) as a module."""

from pathlib import Path
from typing import Any

from torch import nn

from deploy import foreign, huggingface, usercode
from deploy.project import Project
from deploy.weights import assign, check_finite, load_weights
from targets.errors import ModelError, UsageError


def load_module(project: Project) -> nn.Module:
    """What the project's factory returns, with its weights, in evaluation mode.

    Raises UsageError for what is missing, ModelError for a factory that raises or weights that do not fit.
    """
    _check_source(project)
    if foreign.is_model(project.tables.model.source):
        module: nn.Module = foreign.load_module(project.path(project.tables.model.source), project.specs())
        return module
    module = run_factory(project.tables.model.source, project.folder)
    if project.tables.model.weights:
        file = project.path(project.tables.model.weights)
        assign(module, load_weights(file), origin=project.tables.model.weights)
    else:
        check_finite(module, origin=project.tables.model.source)
    return module.eval()


def run_factory(source: str, folder: Path) -> nn.Module:
    """The module that a "file.py:factory" makes, or the one in a Hugging Face folder with its weights."""
    if huggingface.is_folder(folder / source):
        return huggingface.load_folder(folder / source)
    if ".py:" not in source:
        raise UsageError(
            "model.source does not fit",
            found=repr(source),
            expected='a factory such as "model.py:build", a Hugging Face folder, or model.onnx',
            fix="correct [model] source; paths are relative to deploy.toml",
        )
    factory = usercode.load_attribute(source, folder)
    module: Any = usercode.call(factory, reference=source, folder=folder, error=ModelError)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{source} returns no module",
            found=type(module).__name__,
            expected="a torch.nn.Module",
            fix="return the module from the factory",
        )
    return module


def _check_source(project: Project) -> None:
    """What holds its own weights takes no others: they would leave open which count."""
    tables = project.tables.model
    whole = foreign.is_model(tables.source) or huggingface.is_folder(project.path(tables.source))
    if tables.weights and whole:
        raise UsageError(
            "model.weights cannot go with a model that holds its own",
            found=repr(tables.weights),
            expected=f"the weights in {tables.source}",
            fix="remove [model] weights",
        )
