"""Finds a target by name, alias, marketing name or SoC number; also the project's own targets/ folder."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from targets.errors import UsageError, nearest
from targets.profile import (
    Accelerator,
    Chip,
    Cluster,
    Fact,
    Memory,
    Profile,
    RuntimeSupport,
    Target,
)

FOLDER = Path(__file__).parent / "catalog"
HOST = "host"
HOST_ALIASES = ("this machine", "localhost", "local")
LARGEST_FILE_BYTES = 1 << 20

# Which struct holds the keys of a table, by the last word of the table's path: names the nearest valid key.
TABLES: dict[str, type[Profile]] = {
    "": Target,
    "chips": Chip,
    "clusters": Cluster,
    "memory": Memory,
    "accelerators": Accelerator,
    "runtimes": RuntimeSupport,
    "facts": Fact,
}


def find(name: str, *, project_folder: Path | None = None) -> Target:
    """The target of this name; a chip's name or SoC number gives its device with that chip alone.

    Case and punctuation do not matter. The project's own targets come before the catalogue's. Raises
    UsageError that names the nearest three when there is none, and for a damaged file of the project.
    """
    wanted = squash(name)
    if wanted in {squash(word) for word in (HOST, *HOST_ALIASES)}:
        return _host()
    own = _project_targets(project_folder)
    found = _match(wanted, own.values()) or _match(wanted, _catalogue_candidates(wanted, besides=own))
    if found is None:
        raise _unknown(name, all_targets(project_folder=project_folder))
    return found


def names(*, project_folder: Path | None = None) -> list[str]:
    """Names of all targets, sorted, the detected host last."""
    own = _project_targets(project_folder)
    return [*sorted({file.stem for file in _catalogue_files()} | own.keys()), HOST]


def all_targets(*, project_folder: Path | None = None) -> list[Target]:
    """Every target, sorted by name, the detected host last."""
    own = _project_targets(project_folder)
    catalogue = {file.stem: file for file in _catalogue_files() if file.stem not in own}
    found = own | {name: load(file) for name, file in catalogue.items()}
    return [*(found[name] for name in sorted(found)), _host()]


def load(file: Path) -> Target:
    """The target that a file describes.

    Raises UsageError naming the file and the key for anything that does not fit.
    """
    target = decode(_read(file), origin=str(file))
    if target.name != file.stem:
        raise UsageError(
            f"{file}: a target's file is called after its name",
            found=f"name = {target.name!r} in {file.name}",
            expected=f"{target.name}.toml",
            fix=f"rename the file or set name = {file.stem!r}",
        )
    if target.is_this_machine or squash(target.name) == HOST:
        raise UsageError(
            f"{file}: this machine is detected, never declared",
            found=f"name = {target.name!r}, is_this_machine = {str(target.is_this_machine).lower()}",
            fix=f"remove is_this_machine, choose another name, or use --target {HOST}",
        )
    return target


def decode(text: str, *, origin: str) -> Target:
    """A target from TOML; `origin` names the text in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} is not TOML: {error}", fix="correct the line it names") from error
    except RecursionError as error:
        raise UsageError(f"{origin} is nested too deeply", fix="remove the nesting") from error
    try:
        return msgspec.convert(table, Target)
    except msgspec.ValidationError as error:
        raise _misfit(str(error), table, origin) from error


def squash(name: str) -> str:
    """A name without case and punctuation, as names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _match(wanted: str, targets: Iterable[Target]) -> Target | None:
    """By name first, then by alias or title, then by chip; None where nothing fits or nothing was asked."""
    if not wanted:
        return None
    targets = list(targets)
    for target in targets:
        if squash(target.name) == wanted:
            return target
    for target in targets:
        if wanted in {squash(word) for word in (target.title, *target.aliases)}:
            return target
    for target in targets:
        for chip in target.chips:
            if wanted in {squash(word) for word in (chip.name, chip.title, *chip.soc)}:
                return msgspec.structs.replace(target, chips=(chip,))
    return None


def _catalogue_candidates(wanted: str, *, besides: Iterable[str]) -> Iterator[Target]:
    """Targets whose file is called so, else those whose text holds the name at all.

    Parsing the whole catalogue takes longer than the rest of `deploy plan`; looking for the words does not.
    """
    files = [file for file in _catalogue_files() if file.stem not in set(besides)]
    exact = [file for file in files if squash(file.stem) == wanted]
    for file in exact or [file for file in files if wanted in squash(_read(file))]:
        yield load(file)


def _catalogue_files() -> list[Path]:
    return sorted(FOLDER.glob("*.toml"))


def _project_targets(folder: Path | None) -> dict[str, Target]:
    """The targets that a project brings, by name; all are parsed, so that a mistake is never passed over."""
    if folder is None:
        return {}
    files = sorted(file for file in (folder / "targets").glob("*.toml") if not file.name.startswith("."))
    return {file.stem: load(file) for file in files}


def _read(file: Path) -> str:
    try:
        if not file.is_file():
            raise UsageError(f"{file} is no regular file", expected="a TOML file that describes a target")
        with file.open("rb") as stream:
            data = stream.read(LARGEST_FILE_BYTES + 1)
        if len(data) > LARGEST_FILE_BYTES:
            raise UsageError(
                f"{file} is too large for a target", expected=f"at most {LARGEST_FILE_BYTES} bytes"
            )
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not text", found=f"byte {data[error.start]:#04x} at {error.start}", expected="UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read", found=error.strerror, expected="a readable file"
        ) from error


def _misfit(message: str, table: dict[str, Any], origin: str) -> UsageError:
    """msgspec's sentence as ours: the file, the key, its value, and the nearest key for an unknown one."""
    what, _, path = message.partition(" - at `")
    key = path.rstrip("`").removeprefix("$").removeprefix(".")
    where = f"{origin}: {key}" if key else origin
    unknown = re.search(r"unknown field `(.*)`", what)
    if not unknown:
        return UsageError(f"{where} does not fit: {what}", found=_value(table, key), fix="correct that key")
    words = [word for word in re.findall(r"[a-z_]+", key) if word in TABLES]
    fields = TABLES[words[-1] if words else ""].__struct_fields__
    known = [field for field in fields if field != "is_this_machine"]
    return UsageError(
        f"{where} has an unknown key",
        found=unknown[1],
        expected=f"one of {', '.join(known)}",
        fix=f"did you mean {nearest(unknown[1], known, 1)[0]}?",
    )


def _value(table: Any, key: str) -> str | None:
    """A plain value by its path in msgspec's spelling; None for a whole table or where the path is vague."""
    for step in re.findall(r"[^.\[\]]+|\.{3}", key):
        try:
            table = table[int(step) if isinstance(table, list) else step]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return None if isinstance(table, dict | list) else repr(table)[:80]


def _unknown(name: str, targets: list[Target]) -> UsageError:
    declared = [target for target in targets if not target.is_this_machine]
    words = {HOST, *(target.name for target in declared)}
    words |= {chip.name for target in declared for chip in target.chips}
    return UsageError(
        f"there is no target {name!r}",
        expected=f"a name such as {', '.join(nearest(name, sorted(words)))}",
        fix="`deploy targets` lists them all; a project adds its own as targets/NAME.toml beside deploy.toml",
    )


def _host() -> Target:
    from targets.detect import detect_host

    return detect_host()
