"""The pages of docs/ agree with the code and with each other."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from deploy import project, reference
from deploy.project import ProjectTables
from targets import tables

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
GUIDE = (DOCS / "index.md").read_text(encoding="utf-8")

# Keys of deploy.toml that parse and that nothing reads yet: the guide says so of each.
UNREAD = {"tokenizer", "on_miss", "speedup"}


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a page in one language, "" where none is named."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for named, content in fenced if named == language]


def keys(struct: type[msgspec.Struct], path: str = "") -> Iterator[tuple[str, str]]:
    """(table, key) of everything that deploy.toml may hold."""
    for field in msgspec.structs.fields(struct):
        inner = inner_struct(field.type)
        if inner is not None:
            yield from keys(inner, field.encode_name)
        elif path:
            yield path, field.encode_name


def inner_struct(kind: Any) -> type[msgspec.Struct] | None:
    for candidate in (kind, *getattr(kind, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


@pytest.mark.parametrize("name", reference.DOCUMENTS)
def test_the_page_is_what_the_code_generates(name: str) -> None:
    """If this fails: make docs"""
    assert (DOCS / name).read_text(encoding="utf-8") == reference.DOCUMENTS[name]()


def test_make_docs_writes_every_generated_page(tmp_path: Path) -> None:
    reference.main(tmp_path)
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {*reference.DOCUMENTS, *tables.DOCUMENTS}
    assert "-m deploy.reference docs" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_command_reference_names_every_command_and_flag() -> None:
    text = reference.command_reference()
    for names, command in reference.commands():
        section = text.partition(f"# {' '.join(names)}")[2].partition("\n#")[0]
        assert section, names
        flags = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        assert all(flag in section for flag in flags)


def test_every_exit_code_has_its_row() -> None:
    text = reference.exit_code_reference()
    codes = [int(line.split("|")[1]) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert codes == [0, 1, 2, 3, 4, 5, 6, 7, 8, 130]


def test_schemas_name_the_contracts_keys_and_close_no_door() -> None:
    manifest = json.loads(reference.DOCUMENTS["schema/manifest.json"]())
    assert {"schema_version", "rungs", "chosen_by", "files"} <= manifest["$defs"]["Manifest"][
        "properties"
    ].keys()
    assert manifest["$schema"].startswith("https://json-schema.org/")
    toml = json.loads(reference.project_schema())["$defs"]
    assert toml["ProjectTables"]["additionalProperties"] is False
    assert "log-mel" in toml["Preprocess"]["properties"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize(("table", "key"), sorted(set(keys(ProjectTables))))
def test_the_guide_explains_every_key_of_deploy_toml(table: str, key: str) -> None:
    assert re.search(rf"`{re.escape(key)}`|\b{re.escape(key)} = |[{{ ]{re.escape(key)}[ ,}}]", GUIDE), (
        table,
        key,
    )


def test_the_guide_says_of_a_key_that_nothing_reads_it_yet_and_of_no_other() -> None:
    said = set(re.findall(r"^\| `(\w+)` \|.*not read by this version", GUIDE, re.MULTILINE))
    assert said == UNREAD


@pytest.mark.parametrize("key", sorted({key for _, key in keys(ProjectTables)} - {"height", "width"}))
def test_a_key_of_deploy_toml_is_read_by_something(key: str) -> None:
    name = key.replace("-", "_")
    pattern = re.compile(rf'\.{name}\b|"{key}"|"{name}"|\b{name}: ')
    readers = [
        file
        for package in ("deploy", "calibration")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "project.py" and "reporting" not in file.parts and pattern.search(file.read_text())
    ]
    assert bool(readers) == (key not in UNREAD)


@pytest.mark.parametrize("text", blocks(GUIDE, "toml"))
def test_the_examples_of_the_guide_are_valid(text: str) -> None:
    tables = project.check(tomllib.loads(text), origin="docs/index.md")
    assert tables.model.source == "model.py:build"


def test_the_defaults_in_the_guide_are_those_of_the_code() -> None:
    stated = dict(re.findall(r"^\| `(\w+)` \| `?\"?([\w.-]+)\"?`? \|", GUIDE, re.MULTILINE))
    tables = project.check(
        {
            "model": {"source": "model.py:build"},
            "inputs": {"x": {"shape": [1]}},
            "evaluate": {"source": "e.npz"},
            "recover": {"source": "r.npz"},
        },
        origin="test",
    )
    found = {
        field: getattr(table, field)
        for table in (tables.evaluate, tables.recover, tables.prune, tables.quantize, tables.budget)
        for field in (table.__struct_fields__ if table else ())
    }
    checked = [
        key
        for key, text in stated.items()
        if key in found and text not in ("none", "required", "all", "chosen") and found[key] not in (None, [])
    ]
    assert {"metric", "accept", "epochs", "batch_size", "criterion", "observer"} <= set(checked)
    assert {key: stated[key] for key in checked} == {
        key: f"{found[key]:g}" if isinstance(found[key], float) else str(found[key]) for key in checked
    }


def command_lines() -> list[str]:
    """Every command of this tool in a code block of a page."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
    ]
    return sorted({line.partition("#")[0].strip() for line in lines if line.startswith("deploy ")})


@pytest.mark.parametrize("line", command_lines())
def test_commands_in_the_pages_exist_with_their_flags(line: str) -> None:
    known = {names[1:]: command for names, command in reference.commands()}
    words = line.split()[1:]
    length = max(n for n in range(len(words) + 1) if tuple(words[:n]) in known)
    command = known[tuple(words[:length])]
    flags = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
    assert length > 0, line
    is_group = isinstance(command, click.Group)
    assert not is_group or all(word.startswith("-") for word in words[length:]), line
    assert {word for word in words[length:] if word.startswith("-")} <= flags


def test_claims_name_tests_that_exist() -> None:
    text = (DOCS / "claims.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_decision_says_what_why_and_at_what_price() -> None:
    records = sorted((DOCS / "decisions").glob("*.md"))
    assert len(records) >= 7
    for record in records:
        text = record.read_text(encoding="utf-8")
        assert all(word in text for word in ("**Decision.**", "**Why.**", "**Price.**")), record.name
