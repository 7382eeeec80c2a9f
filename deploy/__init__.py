"""The product: plan, prune, recover, quantize, export, validate, measure, bundle.

Its verbs are functions here, each loaded when it is first asked for, so that `import deploy` stays light:

    import deploy
    deploy.plan("examples/digits", target="galaxy-s22")
    build = deploy.build("examples/digits", target="galaxy-s22")
    smaller = deploy.compress(module, target="galaxy-s22", data={"image": images}, sparsity=0.4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.compression import compress
    from deploy.initialise import initialise as init
    from deploy.pruning.channels import prune_channels as prune
    from deploy.pruning.delta import load_pruned, save_pruned
    from deploy.verbs import build, compare, plan

PUBLIC = {
    "build": "deploy.verbs:build",
    "compare": "deploy.verbs:compare",
    "compress": "deploy.compression:compress",
    "init": "deploy.initialise:initialise",
    "load_pruned": "deploy.pruning.delta:load_pruned",
    "plan": "deploy.verbs:plan",
    "prune": "deploy.pruning.channels:prune_channels",
    "save_pruned": "deploy.pruning.delta:save_pruned",
}

__all__ = ["build", "compare", "compress", "init", "load_pruned", "plan", "prune", "save_pruned"]


def __getattr__(name: str) -> Any:
    """A verb, imported now."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'deploy' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
