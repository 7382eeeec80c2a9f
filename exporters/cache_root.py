"""Where finished work and isolated environments are kept."""

import os
from pathlib import Path


def cache_root() -> Path:
    """$EDGE_DEPLOY_CACHE, else $XDG_CACHE_HOME/edge-deploy, else ~/.cache/edge-deploy."""
    if named := os.environ.get("EDGE_DEPLOY_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edge-deploy"
