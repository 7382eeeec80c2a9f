"""`deploy bundle --for server`: what is in it, the same bytes twice, and that it runs by what it holds."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import kubernetes_validate
import pytest
import tritonclient.grpc as triton
import yaml

from deploy.bundling.requirements import installed
from deploy.bundling.writing import MARK

ROOT = Path(__file__).parents[2]
DEPLOY = [sys.executable, "-P", "-m", "deploy.cli.main"]

# Runs a bundle's script with torch out of reach, then tells where our modules came from.
ALONE = """
import json, runpy, sys
for name in ("torch", "onnx", "onnxscript", "torchao", "openvino", "executorch"):
    sys.modules[name] = None
try:
    runpy.run_path(sys.argv[1])
except SystemExit as ended:
    code = ended.code or 0
else:
    code = 0
ours = ("targets", "calibration", "exporters", "deploy")
own = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ours]
print(json.dumps([code, own]))
"""


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*DEPLOY, *map(str, words)], capture_output=True, text=True, check=False)


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("bundle") / "digits"
    shutil.copytree(ROOT / "examples" / "digits", project, ignore=shutil.ignore_patterns("build"))
    flags = ("--runtime", "onnxruntime", "--no-ladder", "--pattern", "none", "-q")
    done = run("build", "-c", project, "--target", "host", *flags)
    assert done.returncode == 0, done.stderr
    return project / "build" / "digits" / "host"


@pytest.fixture(scope="module")
def bundle(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "served"
    done = run("bundle", build, "--for", "server", "-o", folder, "--archive", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["folder"] == str(folder)
    assert Path(told["archive"]).is_file()
    return folder


def test_the_bundle_holds_all_that_a_server_needs(bundle: Path, build: Path) -> None:
    names = digests(bundle).keys()
    wanted = {
        "README.md", "requirements.txt", "serve.py", "selftest.py", "Containerfile", "kubernetes.yaml",
        "edge-deploy-digits.service", "sbom.cdx.json", "model/manifest.json", "model/inputs.npz",
        "model/expected.npz", "triton/digits/config.pbtxt", "triton/digits/1/model.onnx", "ovms/config.json",
        "licences/edge-deploy/LICENSE", "runner/deploy/serving/server.py",
    }  # fmt: skip
    assert wanted <= names
    manifest = json.loads((build / "manifest.json").read_text())
    for file in manifest["files"]:
        assert digests(bundle)[f"model/{file['path']}"] == file["sha256"]


def test_a_bundle_speaks_grpc_by_its_own_code_where_that_was_asked_for(
    build: Path, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    done = run("bundle", build, "--for", "server", "-o", folder, "--grpc")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^grpcio==\S+ \\\n    --hash=", (folder / "requirements.txt").read_text(), re.MULTILINE)
    assert "grpcio" not in (bundle / "requirements.txt").read_text()
    assert "runner/deploy/serving/grpc_server.py" in digests(bundle)
    port = r"listening on grpc://127\.0\.0\.1:(\d+)"
    words = [sys.executable, "-P", str(folder / "serve.py"), "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        found = next(filter(None, (re.search(port, line) for line in process.stderr)))
        with triton.InferenceServerClient(f"127.0.0.1:{found[1]}") as client:
            assert client.is_model_ready("digits")
        process.terminate()
        assert process.wait(20) == 0


def test_the_same_build_gives_the_same_bytes_and_the_archive_holds_the_folder(
    build: Path, bundle: Path, tmp_path: Path
) -> None:
    again = tmp_path / "served"
    assert run("bundle", build, "--for", "server", "-o", again, "--archive").returncode == 0
    assert digests(again) == digests(bundle)
    archive = bundle.with_name("served.tar.gz")
    assert again.with_name("served.tar.gz").read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as packed:
        streams = {member.name: packed.extractfile(member) for member in packed.getmembers()}
        held = {name: hashlib.sha256(s.read()).hexdigest() for name, s in streams.items() if s is not None}
    assert held == {f"served/{name}": digest for name, digest in digests(bundle).items() if name != MARK}


def test_every_requirement_is_exact_and_hashed_and_none_is_torch(bundle: Path) -> None:
    text = (bundle / "requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==([\w.]+) \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    names = {name for name, _ in pinned}
    assert {"onnxruntime", "numpy", "starlette", "uvicorn", "msgspec", "prometheus-client"} <= names
    assert not {"torch", "executorch", "openvino", "edge-deploy"} & names
    assert names == installed([*names]).keys()


@pytest.mark.parametrize("script", ["selftest.py", "serve.py"])
def test_the_scripts_run_by_what_the_bundle_holds(bundle: Path, tmp_path: Path, script: str) -> None:
    words = [sys.executable, "-P", "-c", ALONE, str(bundle / script)]
    words += ["--help"] if script == "serve.py" else []
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    code, own = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert own
    assert all(Path(file).is_relative_to(bundle / "runner") for file in own if file)


@pytest.mark.parametrize("name", ["model/expected.npz", "model/labels"])
def test_the_selftest_sees_damage(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (file,) = copy.glob(f"{name}*")
    file.write_bytes(b"damaged")
    words = [sys.executable, "-P", str(copy / "selftest.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr


def test_the_sbom_names_every_requirement_with_its_hash(bundle: Path) -> None:
    content = json.loads((bundle / "sbom.cdx.json").read_text())
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    text = (bundle / "requirements.txt").read_text()
    for component in content["components"]:
        assert f"{component['name']}=={component['version']}" in text
        assert component["hashes"][0]["content"] in text
        assert component["purl"].startswith("pkg:pypi/")
    assert len(content["components"]) == text.count("--hash")


def test_every_package_brings_its_licence(bundle: Path) -> None:
    text = (bundle / "requirements.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE):
        assert any((bundle / "licences" / f"{name}-{version}").iterdir()), name


def test_the_layouts_for_other_servers_fit_the_model(bundle: Path) -> None:
    config = (bundle / "triton" / "digits" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "max_batch_size: 64" in config
    assert '{ name: "image", data_type: TYPE_FP32, dims: [ 1, 8, 8 ] }' in config
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ 10 ] }' in config
    served = json.loads((bundle / "ovms" / "config.json").read_text())["model_config_list"][0]["config"]
    assert served["name"] == "digits"


@pytest.mark.parametrize(("old", "new"), [("", ""), ("ProtectSystem=strict", "ProtectSystm=strict")])
def test_systemd_takes_the_unit_and_would_see_a_wrong_line(
    bundle: Path, tmp_path: Path, old: str, new: str
) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the unit was not verified: no systemd-analyze on this machine")
    unit = "edge-deploy-digits.service"
    text = (bundle / unit).read_text().replace("/opt/digits/.venv/bin/python", sys.executable)
    (tmp_path / unit).write_text(text.replace(old, new) if old else text)
    words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if unit in line]
    assert ("Unknown key 'ProtectSystm'" in done.stderr) == bool(old)
    assert bool(told) == bool(old), done.stderr


KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest version whose schemas the manifests are held against."""


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_the_manifests_and_nothing_else(bundle: Path, version: str) -> None:
    documents = list(yaml.safe_load_all((bundle / "kubernetes.yaml").read_text()))
    assert [each["kind"] for each in documents] == ["Deployment", "Service"]
    for each in documents:
        kubernetes_validate.validate(each, version, strict=True)
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    container["readinessProb"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProb"):
        kubernetes_validate.validate(documents[0], version, strict=True)


def test_nothing_of_this_machine_is_in_the_bundle(bundle: Path) -> None:
    for file in bundle.rglob("*"):
        if file.is_file():
            assert str(ROOT).encode() not in file.read_bytes(), file


def test_an_older_bundle_is_replaced_and_a_folder_of_others_is_not(build: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        assert run("bundle", build, "--for", "server", "-o", folder).returncode == 0
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused = run("bundle", build, "--for", "server", "-o", mine)
    assert refused.returncode == 2
    assert "a folder with other files" in refused.stderr
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_build_whose_runtime_needs_torch_is_refused_with_what_to_do(build: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(build, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "runtime": "executorch"}))
    refused = run("bundle", copy, "--for", "server", "-o", tmp_path / "out")
    assert refused.returncode == 3
    assert "needs torch" in refused.stderr
    assert "--runtime onnxruntime" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_no_build_and_a_damaged_one_are_told(build: Path, tmp_path: Path) -> None:
    assert run("bundle", tmp_path, "--for", "server", "-o", tmp_path / "out").returncode == 2
    copy = tmp_path / "copy"
    shutil.copytree(build, copy)
    next(copy.glob("*.onnx")).write_bytes(b"")
    assert run("bundle", copy, "--for", "server", "-o", tmp_path / "out").returncode == 8
    assert not (tmp_path / "out").exists()
