"""Users' own Python: loaded under a private name, its failures told with the user's line."""

import sys
from pathlib import Path

import pytest

from deploy import usercode
from targets.errors import ModelError, UsageError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_users_files_may_take_our_names_and_import_each_other(tmp_path: Path) -> None:
    write(
        tmp_path,
        deploy="import calibration, json\nfrom calibration import TWO\ndef build(): return calibration.TWO",
        calibration="TWO = 2",
    )
    before = list(sys.path)
    assert usercode.load_attribute("deploy.py:build", tmp_path)() == 2
    assert sys.path == before
    assert sys.modules["deploy"].__file__ != str(tmp_path / "deploy.py")
    assert not list(tmp_path.glob("__pycache__"))


def test_two_projects_with_the_same_file_names_stay_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, model=f"def build(): return {name!r}")
    assert [usercode.load_attribute("model.py:build", tmp_path / name)() for name in "ab"] == ["a", "b"]


@pytest.mark.parametrize("name", ["my model.py", "model.v2.py", "größe 数.py"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("def build(): return __file__")
    assert usercode.load_attribute(f"{name}:build", tmp_path)() == str(tmp_path / name)


def test_an_edited_file_is_imported_again(tmp_path: Path) -> None:
    write(tmp_path, model="from part import N\ndef build(): return N", part="N = 1")
    assert usercode.load_attribute("model.py:build", tmp_path)() == 1
    write(tmp_path, part="N = 1000")
    assert usercode.load_attribute("model.py:build", tmp_path)() == 1000


def test_files_below_the_project_count_as_its_own(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write(tmp_path / "src", model="import part\ndef build(): return 1", part="")
    usercode.load_attribute("src/model.py:build", tmp_path)
    names = {str(file.relative_to(tmp_path.resolve())) for file in usercode.local_files(tmp_path)}
    assert names == {"src/model.py", "src/part.py"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1 / 0", "importing m.py raised at m.py, line 1; found ZeroDivisionError"),
        ("x = (", r"importing m.py raised; found SyntaxError.*line 1"),
        (
            "import sys\nsys.exit('bye')",
            "importing m.py called sys.exit at m.py, line 2; found SystemExit: bye",
        ),
        ("class Odd(BaseException): pass\nraise Odd", "importing m.py raised at m.py, line 2; found Odd"),
        ("import nosuch", "found ModuleNotFoundError: No module named 'nosuch'"),
        ("\0", "importing m.py raised"),
    ],
)
def test_a_file_that_fails_on_import_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    write(tmp_path, m=text)
    for _ in range(2):  # a second try must not find half a module
        with pytest.raises(ModelError, match=told):
            usercode.load_attribute("m.py:build", tmp_path)


def test_a_ctrl_c_in_users_code_is_a_ctrl_c(tmp_path: Path) -> None:
    write(tmp_path, m="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        usercode.load_attribute("m.py:build", tmp_path)


def test_an_exception_that_cannot_describe_itself_is_still_told(tmp_path: Path) -> None:
    write(
        tmp_path,
        m="class Bad(Exception):\n    def __str__(self): raise ValueError\ndef f(): raise Bad",
    )
    function = usercode.load_attribute("m.py:f", tmp_path)
    with pytest.raises(UsageError, match=r"m\.py:f raised at m\.py, line 3; found Bad"):
        usercode.call(function, reference="m.py:f", folder=tmp_path, error=UsageError)


def test_what_users_code_prints_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, m="print('one')\ndef f(): print('two')")
    function = usercode.load_attribute("m.py:f", tmp_path)
    usercode.call(function, reference="m.py:f", folder=tmp_path, error=UsageError)
    assert capsys.readouterr() == ("", "one\ntwo\n")


def test_a_generator_that_raises_half_way_is_told_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, m="def f():\n    yield 1\n    raise SystemExit")
    made = usercode.load_attribute("m.py:f", tmp_path)()
    items = usercode.iterate(made, reference="m.py:f", folder=tmp_path, error=UsageError)
    assert next(items) == 1
    with pytest.raises(UsageError, match="line 3"):
        next(items)


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("m.py", "does not fit"),
        ("m.py:", "does not fit"),
        ("m.txt:f", "does not fit"),
        ("no.py:f", "no.py is missing"),
        ("m.py:biuld", "found build"),
    ],
)
def test_a_reference_that_names_nothing_is_a_usage_error(tmp_path: Path, reference: str, told: str) -> None:
    write(tmp_path, m="def build(): pass")
    with pytest.raises(UsageError, match=told):
        usercode.load_attribute(reference, tmp_path)
