"""The user's model: "file.py:factory" with its weights, as a module ready to be worked on."""

from pathlib import Path
from typing import Any

from torch import nn

from deploy import usercode
from deploy.project import Project
from deploy.weights import assign, check_finite, load_weights
from targets.errors import ModelError, UsageError


def load_module(project: Project) -> nn.Module:
    """What the project's factory returns, with its weights, in evaluation mode.

    Raises UsageError for what is missing, ModelError for a factory that raises or weights that do not fit.
    """
    module = run_factory(project.tables.model.source, project.folder)
    if project.tables.model.weights:
        file = project.path(project.tables.model.weights)
        assign(module, load_weights(file), origin=project.tables.model.weights)
    else:
        check_finite(module, origin=project.tables.model.source)
    return module.eval()


def run_factory(source: str, folder: Path) -> nn.Module:
    """The module that a "file.py:factory" makes."""
    if ".py:" not in source:
        raise UsageError(
            "model.source does not fit",
            found=repr(source),
            expected='a factory such as "model.py:build"',
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
