"""The house keeps its shape: directions of imports, lazy tables, names, and a fast start."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("targets", "calibration", "exporters", "deploy")  # each may import those to its left
REFERENCE = re.compile(rf"^({'|'.join(PACKAGES)})(\.\w+)+:\w+$")

# What the product's functions are called, beside what deploy/__init__.py offers today.
FUNCTIONS = (
    "analyze", "bench", "build", "bundle", "compare", "compress", "init", "plan", "prune", "search", "serve",
    "validate",
)  # fmt: skip

LIGHT = (
    "deploy", "deploy.cli.main", "deploy.cli.build", "deploy.cli.plan", "deploy.cli.doctor",
    "deploy.cli.cache", "deploy.planner", "deploy.diagnosis", "deploy.inventory", "deploy.reference",
    "deploy.building", "deploy.pipeline", "deploy.reporting.html", "exporters.base", "calibration.sources",
    "targets.catalog", "targets.truth", "targets.detect",
)  # fmt: skip

# Spelled in pieces, so that this file may be searched too.
FORBIDDEN = (
    r"(?<![\w.~$}>-])/(?:wo" + r"rk|ro" + r"ot|opt/ve" + r"nvs)/",
    r"(?<![\w.])/(?:ho" + r"me|Us" + r"ers)/\w+/",
    r"\bpy" + r"pi\.org",
    r"pythonhos" + r"ted\.org",
    r"download\.pyto" + r"rch\.org",
)
BINARY = (".npz", ".safetensors", ".pt", ".pte", ".png")


def modules() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module a file imports anywhere, in functions and for typing too, and what its tables name."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and REFERENCE.match(node.value):
            yield node.value.partition(":")[0]


def tables() -> dict[tuple[str, str], list[str]]:
    """(module, name) of every module-level table that names "module:attribute", with those names."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in modules():
        for statement in tree(file).body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                continue
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            references = [
                node.value
                for node in ast.walk(statement.value)
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and REFERENCE.match(node.value)
            ]
            if references and isinstance(target, ast.Name):
                found[name_of(file), target.id] = references
    return found


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and file.suffix not in BINARY]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_nothing_to_its_right(package: str) -> None:
    right = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = [
        f"{name_of(file)} imports {name}"
        for file in modules()
        if file.relative_to(ROOT).parts[0] == package
        for name in imported(file)
        if name.partition(".")[0] in right
    ]
    assert wrong == []


def test_no_package_imports_tests_examples_or_benchmarks() -> None:
    outside = {"tests", "examples", "benchmarks", "oddities", "pytest"}
    assert [n for file in modules() for n in imported(file) if n.partition(".")[0] in outside] == []


def test_nothing_opens_a_connection() -> None:
    network = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "socketserver", "ssl"}
    assert [n for file in modules() for n in imported(file) if n.partition(".")[0] in network] == []
    calls = [name_of(file) for file in modules() if "grpc" in imported(file)]
    assert calls == ["deploy.serving.grpc_server"], "it listens"
    sockets = [name_of(file) for file in modules() if "socket" in imported(file)]
    assert sockets == ["deploy.serving.server", "exporters.remote"], "one listens, one is a pair"


def test_targets_know_no_torch() -> None:
    heavy = {"torch", "numpy", "executorch", "torchao"}
    wrong = [
        (name_of(file), name)
        for file in modules()
        if file.relative_to(ROOT).parts[0] == "targets"
        for name in imported(file)
        if name.partition(".")[0] in heavy
    ]
    assert wrong == []


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_a_module_only_defines_when_it_is_imported(file: Path) -> None:
    body = tree(file).body
    assert ast.get_docstring(tree(file)), "every module says what it is for"
    for statement in body[1:]:
        runs = isinstance(statement, ast.For | ast.While | ast.With | ast.Try)
        if isinstance(statement, ast.Expr):
            runs = not isinstance(statement.value, ast.Constant)  # a string below a name explains it
        if isinstance(statement, ast.If):
            runs = ast.unparse(statement.test) not in ("TYPE_CHECKING", "__name__ == '__main__'")
        assert not runs, f"line {statement.lineno}: {ast.unparse(statement)[:80]}"


def test_light_modules_load_neither_torch_nor_a_runtime() -> None:
    heavy = ("torch", "executorch", "torchao", "transformers", "sklearn", "scipy")
    code = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[]"


def test_the_command_starts_without_rich_and_numpy() -> None:
    slow = ("rich", "numpy", "msgspec", "torch", "grpc", "google.protobuf")
    code = f"import sys, deploy.cli.main\nprint([name for name in {slow!r} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True, cwd=ROOT
    )
    assert ended.stdout.strip() == "[]", ended.stderr


def test_the_lazy_tables_are_found() -> None:
    assert {("deploy.cli.main", "COMMANDS"), ("exporters.base", "EXPORTERS")} <= tables().keys()


@pytest.mark.parametrize(
    ("table", "reference"),
    [(".".join(table), reference) for table, references in tables().items() for reference in references],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_entry_of_a_lazy_table_resolves(table: str, reference: str) -> None:
    module, _, attribute = reference.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize(("module", "name"), sorted(tables()))
def test_every_lazy_table_is_looked_into(module: str, name: str) -> None:
    """By its own module or by one that imports it: a table nobody reads is a promise nobody keeps."""
    readers = []
    for file in modules():
        nodes = list(ast.walk(tree(file)))
        own = name_of(file) == module
        imports = any(
            isinstance(n, ast.ImportFrom) and n.module == module and any(a.name == name for a in n.names)
            for n in nodes
        )
        reads = any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in nodes)
        through = any(isinstance(n, ast.Attribute) and n.attr == name for n in nodes)
        if (reads and (own or imports)) or through:
            readers.append(name_of(file))
    assert readers


def test_no_submodule_of_deploy_is_called_like_a_public_function() -> None:
    import deploy

    public = {*FUNCTIONS, *getattr(deploy, "__all__", ())}
    taken = {file.stem for file in (ROOT / "deploy").glob("*.py")}
    taken |= {folder.name for folder in (ROOT / "deploy").iterdir() if folder.is_dir()}
    assert taken & public == set()


def test_names_say_what_a_file_holds() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
    assert [name_of(file) for file in modules() if file.stem in vague] == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    pattern = re.compile("|".join(FORBIDDEN))
    found = []
    for file in tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_help_lists_every_command_with_its_line() -> None:
    from deploy.cli.main import COMMANDS

    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "--help"],
        capture_output=True, check=True, text=True, cwd=ROOT, env={"COLUMNS": "120", "PATH": ""},
    )  # fmt: skip
    text = " ".join(ended.stdout.partition("Commands:")[2].split())
    for name, (_, line) in COMMANDS.items():
        assert f"{name} {line}" in text


def test_every_command_and_flag_has_help() -> None:
    import click

    from deploy.reference import commands

    for names, command in commands():
        assert command.help, " ".join(names)
        assert command.name in (names[-1], "cli")
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{' '.join(names)} {parameter.opts}"
                assert all(re.fullmatch(r"--[a-z]+(-[a-z]+)*|-[a-z]", word) for word in parameter.opts)
