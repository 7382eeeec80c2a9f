"""The command's verbs as functions: `deploy.build`, `deploy.plan` and the rest for scripts and notebooks."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.planner import make_plan
from deploy.project import Project, load

if TYPE_CHECKING:
    from deploy.building import Build
    from deploy.manifest import Manifest
    from deploy.planner import Plan
    from deploy.reporting.comparison import Comparison
    from targets.profile import Target

AnyProject = Project | Path | str


def plan(
    project: AnyProject = ".",
    *,
    target: str,
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str | None = None,
    criterion: str | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    objective: str = "latency",
    licences: Collection[str] = (),
    ladder: bool = True,
) -> "Plan":
    """What a build would do and why; the same choices as `deploy plan`. Loads no model.

    `project` is a deploy.toml, its folder, or a Project. Raises UsageError for what does not fit.
    """
    loaded = project if isinstance(project, Project) else load(Path(project))
    (made,) = plan_targets(
        loaded,
        [target],
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        criterion=criterion,
        precision=precision,
        runtime=runtime,
        objective=objective,
        licences=licences,
        ladder=ladder,
    )
    return made


def plan_targets(
    project: Project,
    names: Sequence[str],
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str | None = None,
    criterion: str | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    objective: str = "latency",
    licences: Collection[str] = (),
    ladder: bool = True,
) -> "list[Plan]":
    """One plan a target, choices laid over deploy.toml; all targets resolve before the first is planned."""
    from targets.catalog import find

    flags: dict[str, dict[str, Any]] = {
        "prune": {"sparsity": sparsity, "pattern": pattern, "method": method, "criterion": criterion},
        "quantize": {"precision": precision},
    }

    def planned(target: "Target") -> "Plan":
        tables = project.for_target(target.name, *(chip.name for chip in target.chips))
        return make_plan(
            tables.override(flags),
            target,
            runtimes=[runtime] if runtime else (),
            objective=objective,
            accepted_licences=licences,
            ladder=ladder,
        )

    resolved = [find(name, project_folder=project.folder) for name in names]
    return [planned(target) for target in resolved]


def build(
    project: AnyProject = ".",
    *,
    target: str,
    output_dir: Path | str | None = None,
    seed: int = 0,
    keep_rungs: bool = False,
    require_delegated: bool = False,
    require_measured: bool = False,
    use_cache: bool = True,
    announce: Callable[[str], None] = lambda text: None,
    **choices: Any,
) -> "Build":
    """The whole pipeline for one target; `choices` are those of `plan`.

    A missed budget does not raise: the build stays and its `marked` holds the error. Raises a DeployError
    and leaves the last good build untouched when nothing may ship. `announce` is told what runs.
    """
    from deploy.building import BuildOptions, run_build

    made = plan(project, target=target, **choices)
    folder = Path(output_dir) if output_dir is not None else made.project.folder / "build"
    options = BuildOptions(
        output_dir=folder.absolute(),
        seed=seed,
        keep_rungs=keep_rungs,
        require_delegated=require_delegated,
        require_measured=require_measured,
        use_cache=use_cache,
    )
    return run_build(made, options, announce)


def compare(a: "Build | Manifest | Path | str", b: "Build | Manifest | Path | str") -> "Comparison":
    """What changed from build A to build B; each is a Build, its folder or a manifest."""
    from deploy.reporting.comparison import compare as compare_manifests

    return compare_manifests(_manifest(a), _manifest(b))


def _manifest(build: "Build | Manifest | Path | str") -> "Manifest":
    from deploy.building import Build
    from deploy.manifest import Manifest, read

    if isinstance(build, Build):
        return build.manifest
    return build if isinstance(build, Manifest) else read(Path(build))
