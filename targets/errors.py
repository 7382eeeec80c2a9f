"""What can go wrong, told to a person: one class for each exit code of the command."""

from typing import ClassVar

LONGEST_LINE = 300

COMMANDS = ("pip ", "deploy ", "make ", "adb ", "sudo ")
"""A fix that starts so is to be typed: it keeps its small letter."""


class DeployError(Exception):
    """What failed, the value found, what was expected, and what to do next.

    Raised for mistakes and conditions that a user can act on. Anything else is a bug and keeps
    its traceback (exit 1).
    """

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, found: object = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The four parts as sentences, in one line."""
        parts = [self.what.rstrip(".")]
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected:
            parts.append(f"expected {self.expected}")
        text = "; ".join(parts) + "."
        if not self.fix:
            return text
        is_command = self.fix.startswith(COMMANDS)
        fix = self.fix if is_command else self.fix[0].upper() + self.fix[1:]
        return f"{text} {fix}" if fix[-1] in ".?!" else f"{text} {fix}."


class UsageError(DeployError):
    """A flag, deploy.toml, data or a metric that does not fit."""

    kind = "usage"
    exit_code = 2


class MissingRequirementError(DeployError):
    """The environment lacks something: a package, an SDK, disk space, a writable folder."""

    kind = "environment"
    exit_code = 3


class ModelError(DeployError):
    """The model or its weights cannot be loaded, captured, compressed or exported."""

    kind = "model"
    exit_code = 4


class WrongOutputsError(DeployError):
    """Outputs or accuracy differ beyond tolerance."""

    kind = "outputs"
    exit_code = 5


class BudgetError(DeployError):
    """A budget is missed; the build stays and is marked."""

    kind = "budget"
    exit_code = 6


class DeviceError(DeployError):
    """The device is absent, refuses, or answers wrongly."""

    kind = "device"
    exit_code = 7


class IntegrityError(DeployError):
    """A file is not what its hash or signature says."""

    kind = "integrity"
    exit_code = 8


class InterruptedBuildError(DeployError):
    """The user stopped the work; what was finished is kept and resumes."""

    kind = "interrupted"
    exit_code = 130


def nearest(word: str, known: "list[str] | tuple[str, ...]", count: int = 3) -> list[str]:
    """The known words that look most like this one, best first."""
    from difflib import SequenceMatcher

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, word.lower(), candidate.lower()).ratio()

    return sorted(sorted(known), key=likeness, reverse=True)[:count]


def first_line(error: BaseException) -> str:
    """An exception as its class and the first line of its text, shortened; safe for any user's exception."""
    try:
        text = str(error).strip().splitlines()
    except Exception:  # a user's exception may fail to describe itself
        text = []
    return f"{type(error).__name__}: {text[0][:LONGEST_LINE]}" if text else type(error).__name__
