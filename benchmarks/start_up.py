"""CPU time of the commands that people wait for: `deploy --help`, `deploy plan`, a cached `deploy build`.

    python -m benchmarks.start_up [--runs N] [--json] [-o FOLDER]

User and system seconds of the command and all its processes, in interleaved runs on examples/digits. The
build is made once before, so that every measured one finds all its stages in the cache.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import render
from benchmarks.measuring import (
    DEPLOY,
    Usage,
    deliver,
    interleaved,
    parser,
    plain,
    record,
    run_child,
    summarise,
)

PROJECT = ["-c", "examples/digits", "--target", "galaxy-s22"]
COMMANDS: dict[str, tuple[list[str], float]] = {
    "deploy --help": (["--help"], 0.3),
    "deploy plan": (["plan", *PROJECT], 0.5),
    "deploy build, fully cached": (["build", *PROJECT], 3.0),
}
"""Arguments, and the CPU seconds that are allowed."""


def measure(runs: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each command, with a cache and builds in the folder."""
    env = {"EDGE_DEPLOY_CACHE": str(folder / "cache")}

    def call(words: list[str]) -> Usage:
        output = ["-o", str(folder / "build")] if words[0] == "build" else []
        return run_child([DEPLOY, *words, *output], env=env)

    makers = {name: lambda turn, words=words: call(words) for name, (words, _) in COMMANDS.items()}
    measured = interleaved(makers, runs=runs)  # the round that warms up fills the cache
    return [
        {"name": name, "limit_s": COMMANDS[name][1], "cpu_s": plain(summarise([u.cpu_s for u in usages]))}
        for name, usages in measured.items()
    ]


def main(words: list[str] | None = None) -> None:
    """Measures and prints."""
    arguments = parser(__doc__, runs=15, least=11).parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        result = record("start_up", {"rows": measure(arguments.runs, Path(folder))})
    deliver(result, render.start_up(result), arguments)


if __name__ == "__main__":
    main()
