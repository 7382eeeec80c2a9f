"""The extras of this distribution: which packages each asks for, and whether what is installed fits.

Read from the installed metadata, so that pyproject.toml is the only place that names versions. A plain
installation has no `packaging`; the few operators that pyproject.toml uses are compared here.
"""

import importlib.metadata
import operator
import re
from collections.abc import Callable
from typing import Any

import msgspec

from deploy.manifest import Value

DISTRIBUTION = "edge-deploy"
CORE = ""
FOR_DEVELOPERS = "dev"
EVERYTHING = "all"

_REQUIREMENT = re.compile(r"^(?P<name>[\w.-]+)(?:\[(?P<extras>[^]]*)])?\s*(?P<specifier>[^;]*)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_CLAUSE = re.compile(r"^(==|!=|>=|<=|<|>)\s*(\d+(?:\.\d+)*)$")
_RELEASE = re.compile(r"^v?(\d+(?:\.\d+)*)(.*)$")

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    ">": operator.gt,
}


class Requirement(Value, frozen=True, kw_only=True):
    """A package that an extra asks for; the extra "" stands for the core."""

    name: str
    specifier: str
    extra: str


def requirements() -> tuple[Requirement, ...]:
    """What the core and each extra for users ask for; an extra inside another asks for both.

    Raises PackageNotFoundError where the distribution is not installed.
    """
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    parsed = [parse(line) for line in lines]
    within = {parse(line).extra: _extras_of(line) for line in lines if parse(line).name == DISTRIBUTION}
    found = [each for each in parsed if each.name != DISTRIBUTION and each.extra != FOR_DEVELOPERS]
    for extra, inner in within.items():
        if extra not in (EVERYTHING, FOR_DEVELOPERS):
            found += [
                msgspec.structs.replace(each, extra=extra) for each in tuple(found) if each.extra in inner
            ]
    return tuple(found)


def _extras_of(line: str) -> tuple[str, ...]:
    """The extras in the brackets behind a requirement's name."""
    match = _REQUIREMENT.match(line)
    named = (match["extras"] or "") if match else ""
    return tuple(word.strip() for word in named.split(",") if word.strip())


def parse(line: str) -> Requirement:
    """One line of Requires-Dist, such as 'torch==2.13.0; extra == "executorch"'."""
    match, extra = _REQUIREMENT.match(line), _EXTRA.search(line)
    if match is None:
        raise ValueError(f"{line!r} is no requirement")
    clauses = sorted(
        clause.strip() for clause in match["specifier"].strip(" ()").split(",") if clause.strip()
    )
    return Requirement(
        name=match["name"],
        specifier=",".join(reversed(clauses)),
        extra=extra[1] if extra else CORE,
    )


def fits(version: str, specifier: str) -> bool:
    """Whether an installed version is one that the specifier allows, as PEP 440 orders versions.

    A local label (+cpu) does not count, a pre-release comes before its release and is never below the
    next one's bound. Raises ValueError for an operator that pyproject.toml does not use.
    """
    return all(_fits_clause(version, clause) for clause in specifier.split(",") if clause)


def _fits_clause(version: str, clause: str) -> bool:
    match = _CLAUSE.match(clause.strip())
    if match is None:
        raise ValueError(f"cannot compare with {clause!r}")
    symbol, bound = match[1], _release(match[2])
    release, rest = _split(version)
    before_release = bool(re.match(r"[-_.]?(a|b|c|rc|alpha|beta|pre|dev)", rest))
    if before_release and symbol == "<" and release == bound:
        return False
    rank = -1 if before_release else 1 if re.match(r"[-_.]?(post|r)", rest) else 0
    if rank == 1 and symbol == ">" and release == bound:
        return False
    return _COMPARE[symbol]((release, rank), (bound, 0))


def _split(version: str) -> tuple[tuple[int, ...], str]:
    match = _RELEASE.match(version.partition("+")[0].strip().lower())
    if match is None:
        raise ValueError(f"{version!r} is no version")
    return _release(match[1]), match[2]


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a release without closing zeros: 2.0 is 2."""
    numbers = [int(part) for part in text.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
