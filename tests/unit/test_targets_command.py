"""deploy targets: the list, one profile, and this machine."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from deploy.cli.targets import command
from targets import catalog
from targets.errors import UsageError


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(command, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_without_a_verb_every_target_is_listed() -> None:
    lines = run().output
    assert all(name in lines for name in catalog.names())


def test_json_is_all_that_is_printed_and_reads_back_as_the_same_profiles() -> None:
    import msgspec

    from targets.profile import Target

    assert msgspec.json.decode(run("--json").output, type=list[Target]) == catalog.all_targets()
    assert msgspec.json.decode(run("show", "sm8450", "--json").output, type=Target) == catalog.find("sm8450")
    assert json.loads(run("--json", "show", "sm8450").output)["name"] == "galaxy-s22"
    assert json.loads(run("detect", "--json").output)["is_this_machine"] is True


def test_a_profile_is_shown_with_the_source_of_each_fact() -> None:
    output = run("show", "exynos-2200").output
    chip = catalog.find("exynos-2200").chips[0]
    assert "Snapdragon" not in output
    assert all(fact.source in output for fact in chip.facts.values())


def test_a_projects_own_targets_are_listed_and_shown(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "mine.toml").write_text(
        'name = "mine"\ntitle = "Mine [b]x[/b]"\nkind = "board"\n[[chips]]\nname = "c"\ntitle = "c"\n'
        'architecture = "arm64"\n[[chips.runtimes]]\nname = "executorch"\n'
    )
    (tmp_path / "deploy.toml").write_text("")
    config = str(tmp_path / "deploy.toml")
    assert "mine" in run("-c", config).output
    assert "Mine [b]x[/b]" in run("show", "mine", "-c", config).output
    assert "Mine [b]x[/b]" in run("-c", config, "show", "mine").output


def test_a_wrong_name_a_wrong_device_and_a_missing_configuration_are_errors_of_use() -> None:
    for arguments in (("show", "galaxy-s2"), ("detect", "--device", "adb"), ("-c", "nowhere/deploy.toml")):
        with pytest.raises(UsageError):
            run(*arguments)


def test_the_command_is_a_group_that_loads_neither_torch_nor_rich_before_it_prints() -> None:
    assert isinstance(command, click.Group)
    code = "import sys, deploy.cli.targets; print({'torch', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
