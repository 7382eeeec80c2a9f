"""Finding targets, the catalogue's own consistency, and hostile files of a project."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets import catalog
from targets.errors import UsageError
from targets.profile import Chip, Memory, RuntimeSupport, Target, fact_for, numbers, unsourced

PROMISED = [
    "galaxy-s22", "galaxy-s24", "pixel-8", "iphone-15", "macbook-m3", "raspberry-pi-5", "jetson-orin-nano",
    "jetson-agx-orin", "xeon", "epyc", "graviton4", "laptop", "a100", "h100", "h200", "l4", "a10g",
    "rtx-4090", "mi300x", "coral-edge-tpu", "intel-npu", "ethos-u55", "ethos-u85", "web", "host",
]  # fmt: skip

OWN = """
name = "my-board"
title = "My board"
kind = "board"
aliases = ["The Board"]
[[chips]]
name = "my-chip"
title = "My chip"
architecture = "arm64"
[[chips.runtimes]]
name = "executorch"
channel_multiple = 4
"""


def declared() -> list[Target]:
    return [target for target in catalog.all_targets() if not target.is_this_machine]


def project(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / "targets").mkdir(exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    (folder / "targets" / name).write_bytes(data)
    return folder


def test_every_promised_target_is_there() -> None:
    assert sorted(catalog.names()) == sorted(PROMISED)
    assert [target.name for target in catalog.all_targets()] == catalog.names()


@pytest.mark.parametrize("name", PROMISED)
def test_a_target_is_found_by_its_name_in_any_spelling(name: str) -> None:
    spelling = name.upper().replace("-", " _")
    assert catalog.find(spelling) == catalog.find(name)
    assert catalog.find(name).name == name


def test_a_phone_by_its_name_keeps_both_chips_and_a_chip_stands_for_the_phone_with_it_alone() -> None:
    assert [chip.name for chip in catalog.find("Galaxy S22").chips] == ["sm8450", "exynos-2200"]
    for name in ("sm8450", "SM8450", "Snapdragon 8 Gen 1"):
        found = catalog.find(name)
        assert (found.name, [chip.name for chip in found.chips]) == ("galaxy-s22", ["sm8450"])
    for name in ("exynos-2200", "Exynos 2200", "S5E9925"):
        found = catalog.find(name)
        assert (found.name, [chip.name for chip in found.chips]) == ("galaxy-s22", ["exynos-2200"])


def test_every_alias_title_and_soc_of_the_catalogue_finds_its_own_target_and_no_two_claim_one() -> None:
    owners: dict[str, str] = {}
    for target in declared():
        words = {target.name, target.title, *target.aliases}
        words |= {word for chip in target.chips for word in (chip.name, chip.title, *chip.soc)}
        for word in words:
            assert owners.setdefault(catalog.squash(word), target.name) == target.name, word
            assert catalog.find(word).name == target.name


def test_a_wrong_name_names_the_nearest_three_and_exits_2() -> None:
    with pytest.raises(UsageError) as caught:
        catalog.find("galaxy-s2")
    assert caught.value.exit_code == 2
    suggested = str(caught.value.expected).removeprefix("a name such as ").split(", ")
    assert len(suggested) == 3
    assert "galaxy-s22" in suggested


@pytest.mark.parametrize("name", ["", "   ", "-", "../../etc/passwd", "日本", "galaxy-s999", "a" * 5000])
def test_a_name_that_means_nothing_is_an_error_of_use(name: str) -> None:
    with pytest.raises(UsageError):
        catalog.find(name)


@pytest.mark.parametrize("target", declared(), ids=lambda target: target.name)
def test_every_number_of_the_catalogue_has_a_source(target: Target) -> None:
    for chip in target.chips:
        assert unsourced(chip) == []
        assert not chip.features or fact_for(chip, "features")
        assert not chip.clusters or fact_for(chip, "clusters")
        for unit in chip.accelerators:
            assert not unit.features or fact_for(chip, f"accelerators.{unit.kind}.features")


@pytest.mark.parametrize("target", declared(), ids=lambda target: target.name)
def test_every_fact_of_the_catalogue_explains_something_that_is_there(target: Target) -> None:
    for chip in target.chips:
        stated = {*numbers(chip), "clusters", "features", "memory", "peak_gops"}
        stated |= {f"accelerators.{unit.kind}" for unit in chip.accelerators}
        stated |= {f"accelerators.{unit.kind}.features" for unit in chip.accelerators}
        stated |= {f"accelerators.{unit.kind}.peak_gops" for unit in chip.accelerators}
        assert set(chip.facts) <= stated


def test_a_quantity_without_a_fact_is_reported() -> None:
    chip = catalog.find("sm8450").chips[0]
    facts = {key: fact for key, fact in chip.facts.items() if not key.startswith(("peak_gops", "memory."))}
    assert unsourced(msgspec.structs.replace(chip, facts=facts)) == [
        "peak_gops.float32",
        "peak_gops.float16",
        "peak_gops.int8",
        "memory.size_gb",
        "memory.bandwidth_gb_s",
    ]


def test_derived_peak_rates_of_the_cpu_follow_from_cores_clock_and_pipes() -> None:
    """Operations a cycle and core: 128-bit FMA pipes x 4 float32 x 2."""
    pi = catalog.find("raspberry-pi-5").chips[0]
    assert pi.peak_gops["float32"] == pytest.approx(4 * 2.4 * 2 * 4 * 2)
    phone = catalog.find("sm8450").chips[0]
    assert phone.peak_gops["float32"] == pytest.approx(3.0 * 4 * 8 + 3 * 2.5 * 2 * 8)
    xeon = catalog.find("xeon").chips[0]
    assert xeon.peak_gops["int8"] == pytest.approx(56 * 2.0 * 2048)


def test_width_steps_and_multiples_are_those_of_unit_and_runtime_together() -> None:
    chip = catalog.find("sm8450").chips[0]
    multiples = {runtime.name: chip.width_multiple(runtime) for runtime in chip.runtimes}
    assert multiples == {"executorch": 8, "qnn": 32, "onnxruntime": 8}
    laptop = catalog.find("laptop").chips[0]
    assert {r.name: laptop.width_multiple(r) for r in laptop.runtimes}["openvino"] == 16


def test_features_of_a_runtime_are_those_of_the_unit_it_drives() -> None:
    chip = catalog.find("jetson-orin-nano").chips[0]
    assert "sparse_tensor_cores" in chip.features_for(chip.runtimes[0])
    assert "dotprod" not in chip.features_for(chip.runtimes[0])
    assert chip.peak_for(chip.runtimes[0])["int8"] == 20000


def test_the_phones_start_with_the_runtime_this_version_builds() -> None:
    for name in ("galaxy-s22", "exynos-2200", "galaxy-s24", "pixel-8", "iphone-15"):
        for chip in catalog.find(name).chips:
            assert (chip.runtimes[0].name, chip.runtimes[0].unit) == ("executorch", "cpu")


def test_a_projects_own_target_joins_the_catalogue(tmp_path: Path) -> None:
    project(tmp_path, "my-board.toml", OWN)
    for name in ("my-board", "the board", "MY-CHIP"):
        assert catalog.find(name, project_folder=tmp_path).chips[0].runtimes[0].channel_multiple == 4
    assert "my-board" in catalog.names(project_folder=tmp_path)
    with pytest.raises(UsageError, match="my-bord"):
        catalog.find("my-bord", project_folder=tmp_path)
    with pytest.raises(UsageError):
        catalog.find("my-board")


def test_a_projects_target_overrides_the_catalogues_of_the_same_name(tmp_path: Path) -> None:
    project(tmp_path, "laptop.toml", OWN.replace("my-board", "laptop"))
    assert catalog.find("laptop", project_folder=tmp_path).title == "My board"
    assert [t.title for t in catalog.all_targets(project_folder=tmp_path) if t.name == "laptop"] == [
        "My board"
    ]
    assert catalog.names(project_folder=tmp_path).count("laptop") == 1
    assert catalog.find("a100", project_folder=tmp_path).name == "a100"


BROKEN = {
    "unknown_key_of_the_target": (OWN.replace("aliases", "alias"), ("alias", "did you mean aliases?")),
    "unknown_key_of_a_chip": (OWN.replace("architecture", "architecure"), ("chips[0]", "architecture")),
    "unknown_key_of_a_runtime": (
        OWN.replace("channel_multiple", "channels_multiple"),
        ("channel_multiple?",),
    ),
    "unknown_key_of_a_fact": (OWN + '[chips.facts]\nclusters = { sorce = "x" }', ("sorce", "source")),
    "missing_name": (OWN.replace('name = "my-board"', ""), ("name",)),
    "no_chips": ('name = "my-board"\ntitle = "x"\nkind = "x"\nchips = []', ("chips",)),
    "no_runtimes": (OWN[: OWN.index("[[chips.runtimes]]")], ("runtimes",)),
    "wrong_type": (
        OWN.replace("channel_multiple = 4", 'channel_multiple = "4"'),
        ("channel_multiple", "int"),
    ),
    "a_bool_for_a_number": (OWN.replace("channel_multiple = 4", "channel_multiple = true"), ("bool",)),
    "zero_multiple": (OWN.replace("channel_multiple = 4", "channel_multiple = 0"), (">= 1",)),
    "negative_memory": (OWN.replace("[[chips.r", "[chips.memory]\nsize_gb = -1\n[[chips.r"), ("size_gb",)),
    "nan_memory": (OWN.replace("[[chips.r", "[chips.memory]\nsize_gb = nan\n[[chips.r"), ("size_gb",)),
    "infinite_memory": (OWN.replace("[[chips.r", "[chips.memory]\nsize_gb = inf\n[[chips.r"), ("finite",)),
    "unknown_precision": (OWN + 'precisions = ["float33"]', ("float33",)),
    "unit_that_is_not_there": (OWN + 'unit = "npu"', ("npu", "this chip has cpu")),
    "runtime_twice": (OWN + '[[chips.runtimes]]\nname = "executorch"', ("twice",)),
    "name_with_a_path": (OWN.replace('"my-board"', '"../my-board"'), ("name",)),
    "another_name_than_the_file": (OWN.replace('"my-board"', '"other"'), ("other.toml",)),
    "claims_to_be_this_machine": ("is_this_machine = true\n" + OWN, ("is_this_machine",)),
    "infinite_budget": (OWN + "[budget]\nsize_mb = inf", ("finite",)),
    "not_toml": ("this is { not toml", ("not TOML",)),
    "empty": ("", ("name",)),
    "a_list_of_nothing_deep": ("a = " + "[" * 5000, ("TOML", "nested")),
    "binary": (bytes(range(256)), ("not text",)),
    "utf16": (OWN.encode("utf-16"), ("not text",)),
    "enormous": ("#" * (catalog.LARGEST_FILE_BYTES + 1), ("too large",)),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_file_of_the_project_is_named_with_its_key_and_never_passed_over(
    tmp_path: Path, defect: str
) -> None:
    text, words = BROKEN[defect]
    project(tmp_path, "my-board.toml", text)
    for name in ("my-board", "galaxy-s22"):
        with pytest.raises(UsageError) as caught:
            catalog.find(name, project_folder=tmp_path)
        assert "my-board.toml" in caught.value.message
        assert any(word in caught.value.message for word in words), caught.value.message


def test_a_file_called_host_is_refused(tmp_path: Path) -> None:
    project(tmp_path, "host.toml", OWN.replace("my-board", "host"))
    with pytest.raises(UsageError, match="detected"):
        catalog.find("my-chip", project_folder=tmp_path)


def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "targets" / "x.toml").mkdir(parents=True)
    with pytest.raises(UsageError, match="no regular file"):
        catalog.find("a100", project_folder=tmp_path)
    (tmp_path / "targets" / "x.toml").rmdir()
    os.mkfifo(tmp_path / "targets" / "x.toml")
    with pytest.raises(UsageError, match="no regular file"):
        catalog.find("a100", project_folder=tmp_path)


def test_a_project_without_targets_is_no_error(tmp_path: Path) -> None:
    assert catalog.find("a100", project_folder=tmp_path).name == "a100"
    (tmp_path / "targets").write_text("a file")
    assert catalog.find("a100", project_folder=tmp_path).name == "a100"


@given(st.text(max_size=300))
def test_any_text_gives_a_target_or_an_error_of_use(text: str) -> None:
    refused = None
    try:
        assert catalog.decode(text, origin="some.toml").chips
    except UsageError as error:
        refused = error
    assert refused is None or "some.toml" in refused.message


@given(
    st.sampled_from(["size_gb", "bandwidth_gb_s"]),
    st.floats(allow_nan=True) | st.integers() | st.booleans() | st.text(max_size=5) | st.none(),
)
def test_memory_takes_positive_finite_numbers_and_nothing_else(key: str, value: object) -> None:
    table = msgspec.toml.decode(OWN) | {}
    if value is not None:
        table["chips"][0]["memory"] = {key: value}
    fits = value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
    )
    try:
        msgspec.convert(table, Target)
        assert fits
    except msgspec.ValidationError:
        assert not fits


def test_profiles_cannot_be_changed() -> None:
    target = catalog.find("a100")
    with pytest.raises(AttributeError):
        target.name = "b100"  # type: ignore[misc]


def test_a_chip_made_in_python_is_checked_too() -> None:
    runtime = RuntimeSupport(name="executorch", unit="npu")
    with pytest.raises(ValueError, match="npu"):
        Chip(name="x", title="x", architecture="arm64", runtimes=(runtime,))
    with pytest.raises(ValueError, match="finite"):
        Chip(
            name="x",
            title="x",
            architecture="arm64",
            memory=Memory(size_gb=math.inf),
            runtimes=(RuntimeSupport(name="executorch"),),
        )


def test_the_whole_catalogue_loads_in_50_ms_of_cpu_time() -> None:
    catalog.all_targets()
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        catalog.all_targets()
        best = min(best, time.process_time() - start)
    assert best < 0.05


def test_finding_a_target_imports_nothing_but_the_standard_library_and_msgspec() -> None:
    code = (
        "import sys; before = set(sys.modules);"
        "from targets import catalog, truth, tables; catalog.find('host');"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "import json; print(json.dumps(sorted(new)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # msgspec itself imports typing_extensions where it is installed.
    assert {*json.loads(done.stdout)} - {"typing_extensions"} == {"msgspec", "targets"}
