"""deploy.lock.toml: the resolved configuration and versions of a build, and the way back from it."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from deploy.environment import versions
from deploy.planner import Plan
from deploy.project import Project
from targets.errors import IntegrityError, MissingRequirementError, UsageError

LOCK = "deploy.lock.toml"
HEADER = "# Written by deploy build; deploy build --locked rebuilds this build.\n"


def lock_toml(project: Project, plan: Plan, packages: Mapping[str, str], seed: int) -> bytes:
    """The lock of a build."""
    content = {
        "lock": {
            "target": plan.target.name,
            "runtimes": [runtime.name for runtime in plan.runtimes],
            "objective": plan.objective,
            "licences": list(plan.licences),
            "ladder": len(plan.rungs) > 1,
            "seed": seed,
        },
        "packages": dict(packages),
        "project": _without_nulls(msgspec.to_builtins(project.tables)),
    }
    return (HEADER + tomli_w.dumps(content)).encode()


def read_lock(folder: Path, project: Project) -> tuple[Project, dict[str, Any]]:
    """The locked project and the lock's own table.

    Raises UsageError when there is no lock and MissingRequirementError when versions differ.
    """
    file = folder / LOCK
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise UsageError(
            f"{folder} holds no {LOCK}",
            expected="a finished build to rebuild",
            fix="build once without --locked",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}", fix="build again without --locked") from error
    locked, here = content.get("packages", {}), versions()
    differing = [
        f"{name} {locked[name]} (here {here.get(name, 'absent')})"
        for name in locked
        if here.get(name) != locked[name]
    ]
    if differing:
        raise MissingRequirementError(
            "--locked: this environment differs from the build's",
            found=", ".join(differing),
            expected="the locked versions",
            fix="pip install "
            + " ".join(
                f"{name}=={version}" for name, version in sorted(locked.items()) if here.get(name) != version
            ),
        )
    return project.with_tables(content.get("project", {})), content.get("lock", {})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
