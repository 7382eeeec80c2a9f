"""Flags that mean the same in every command."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from deploy.planner import Plan

Function = TypeVar("Function", bound=Callable[..., Any])

CONFIG = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    default=Path(),
    help="deploy.toml or its folder [default: here].",
)
TARGET = click.option(
    "--target", "targets", multiple=True, required=True, help="The hardware; may be given again."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Say each step, also without a terminal.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")


def choices(function: Function) -> Function:
    """The flags that lay choices over deploy.toml, on plan and build."""
    for option in reversed(_CHOICES):
        function = option(function)
    return function


_CHOICES = (
    click.option("--sparsity", type=float, help="The fraction to remove, above 0 and below 1."),
    click.option("--pattern", help="auto, structured, unstructured, 2:4, block or none."),
    click.option("--method", help="What is removed: auto or channels."),
    click.option("--criterion", help="How channels are ranked: auto, l1, l2, bn, taylor, median, random."),
    click.option("--precision", help="auto, float32, float16, int8 or int8-dynamic."),
    click.option("--runtime", help="The runtime instead of the target's preferred one."),
    click.option("--objective", default="latency", show_default=True, help="latency, throughput or size."),
    click.option(
        "--accept-license", "licences", multiple=True, metavar="NAME", help="Accept a runtime's licence."
    ),
)


def plans(config: Path, targets: tuple[str, ...], **choices: Any) -> "list[Plan]":
    """One plan a target, with the choices of `choices`; all resolve before the first is carried out."""
    from deploy import project as projects
    from deploy.verbs import plan_targets

    return plan_targets(projects.load(config), targets, **choices)
