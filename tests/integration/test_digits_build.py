"""The example project built for a phone, through the command, as a user does it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build of examples/digits for galaxy-s22."""
    work = tmp_path_factory.mktemp("digits")
    shutil.copytree(ROOT / "examples" / "digits", work / "digits", ignore=shutil.ignore_patterns("build"))
    command = [
        sys.executable,
        "-m",
        "deploy.cli.main",
        "build",
        "--target",
        "galaxy-s22",
        "-o",
        "out",
        "--json",
    ]
    done = subprocess.run(command, cwd=work / "digits", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "galaxy-s22"
    return work / "digits" / "out" / "digits" / "galaxy-s22"


@pytest.fixture(scope="module")
def manifest(built: Path) -> dict[str, object]:
    """Its manifest."""
    data: dict[str, object] = json.loads((built / "manifest.json").read_text())
    return data


def test_a_phone_build_is_chosen_by_host_proxy_and_settles_no_device_budget(manifest: dict) -> None:
    assert manifest["chosen_by"] == "host-proxy"
    device = [line for line in manifest["budget"] if line["name"] in ("latency_ms", "peak_memory_mb")]
    assert device
    assert all(line["verdict"] == "unmeasured" and "deploy validate" in line["how"] for line in device)


def test_the_ladder_holds_dense_and_pruned_in_float_and_int8(manifest: dict) -> None:
    names = [rung["name"] for rung in manifest["rungs"]]
    assert names == ["dense-float", "dense-int8", "pruned-float", "pruned-int8"]


def test_every_rung_agrees_with_its_module_at_several_batches(manifest: dict) -> None:
    least = {"float32": 80, "int8": 15}
    for rung in manifest["rungs"]:
        assert rung["parity"]["snr_db"] >= least[rung["precision"]]
        assert rung["parity"]["input_sensitive"]
        assert rung["parity"]["batches"] == [1, 2, 64]


def test_the_shipped_rung_keeps_accuracy_within_one_point(manifest: dict) -> None:
    shipped = next(rung for rung in manifest["rungs"] if rung["name"] == manifest["shipped_rung"])
    assert shipped["accuracy"]["drop"] <= 0.01
    assert shipped["accuracy"]["value"] >= 0.97


def test_the_pruned_rung_removes_the_asked_share_of_multiply_adds(manifest: dict) -> None:
    pruned = next(rung for rung in manifest["rungs"] if rung["name"] == "pruned-float")
    assert pruned["sparsity"] == pytest.approx(0.4, abs=0.02)


def test_files_are_named_by_their_content_and_hold_what_the_manifest_says(
    built: Path, manifest: dict
) -> None:
    import hashlib

    for file in manifest["files"]:
        content = (built / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert file["sha256"][:12] in file["path"]
        assert len(content) == file["size_bytes"]


def test_the_golden_pair_is_what_the_program_answers(built: Path, manifest: dict) -> None:
    from deploy.project import load
    from exporters.remote import RemoteSession

    specs = load(ROOT / "examples" / "digits").specs()
    program = next(built / file["path"] for file in manifest["files"] if file["role"] == "program")
    with np.load(built / "inputs.npz") as inputs, np.load(built / "expected.npz") as expected:
        with RemoteSession("executorch", program, inputs=specs, outputs=["logits"], threads=1) as session:
            answer = session.run({"image": inputs["image"]})
        np.testing.assert_allclose(answer["logits"], expected["logits"], atol=1e-5)


def test_the_raw_golden_inputs_become_the_inputs_by_the_declared_preprocessing(
    built: Path, manifest: dict
) -> None:
    from calibration import preprocess

    settings = preprocess.from_mapping(manifest["inputs"][0]["preprocess"])
    with np.load(built / "raw.npz") as raw, np.load(built / "inputs.npz") as inputs:
        np.testing.assert_array_equal(preprocess.apply(settings, raw["image"]), inputs["image"])


def test_validate_checks_the_golden_pair_and_keeps_a_measurement(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli.main import run

    before = (built / "manifest.json").read_bytes()
    assert run(["validate", str(built), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["golden_snr_db"] > 60
    assert measured["latency"]["measured_on"]["kind"] == "host"
    assert len(list((built / "measurements").glob("host-*.json"))) == 1
    assert (built / "manifest.json").read_bytes() == before


def test_validate_refuses_devices_it_cannot_ask_and_changes_nothing(built: Path) -> None:
    from deploy.cli.main import run

    before = sorted(path for path in built.rglob("*"))
    assert run(["validate", str(built), "--device", "adb"]) == 7
    assert sorted(path for path in built.rglob("*")) == before


def test_validate_tells_a_changed_program(built: Path, manifest: dict, tmp_path: Path) -> None:
    from deploy.cli.main import run

    copy = tmp_path / "build"
    shutil.copytree(built, copy)
    program = next(copy / file["path"] for file in manifest["files"] if file["role"] == "program")
    program.write_bytes(program.read_bytes()[:-1] + b"x")
    assert run(["validate", str(copy)]) == 8
