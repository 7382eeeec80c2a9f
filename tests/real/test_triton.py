"""The bundle's layout for Triton, read by a real Triton's parser and checks.

The wheel brings no backend for ONNX Runtime or OpenVINO: a configuration that Triton accepts is one for
which it goes on to look for the backend, and says that it has none.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from msgspec.structs import replace

from deploy.bundling.modelserver import TRITON_TYPES, triton_files, triton_takes
from deploy.bundling.writing import write_folder
from deploy.manifest import Manifest, Output, read

HERE = Path(__file__).parent
DIGITS = HERE.parents[1] / "examples" / "digits"
FAST = ["--target", "host", "--runtime", "onnxruntime", "--no-ladder", "--pattern", "none", "-q"]

Ask = Callable[[Manifest, Callable[[str], str]], list[str]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/digits for this machine."""
    out = tmp_path_factory.mktemp("build")
    words = [sys.executable, "-P", "-m", "deploy.cli.main", "build", "-c", str(DIGITS), "-o", str(out), *FAST]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "digits" / "host"


@pytest.fixture(scope="module")
def program(preparation: ModuleType) -> tuple[ModuleType, Path]:
    """tritonserver.py and the program it got; skips, saying why, where pip cannot get it."""
    module: ModuleType = preparation.load_file(HERE / "tritonserver.py")
    cache: Path = preparation.load_file(HERE / "training.py").cache_folder()
    try:
        return module, module.obtained(cache)
    except module.NoTritonError as reason:
        pytest.skip(f"no Triton read config.pbtxt: {reason}")


@pytest.fixture
def ask(build: Path, program: tuple[ModuleType, Path], tmp_path: Path) -> Ask:
    """Triton's verdict on a manifest's layout, its configuration changed on the way."""
    module, executable = program

    def asked(manifest: Manifest, change: Callable[[str], str]) -> list[str]:
        files = triton_files(build, manifest)
        name = f"{manifest.model}/config.pbtxt"
        text = files[name]
        assert isinstance(text, bytes)
        write_folder(tmp_path / "repository", {**files, name: change(text.decode()).encode()})
        verdict: list[str] = module.verdict(executable, tmp_path / "repository")
        return verdict

    return asked


def as_built(manifest: Manifest) -> Manifest:
    return manifest


def for_openvino(manifest: Manifest) -> Manifest:
    return replace(manifest, runtime="openvino")


def without_a_batch(manifest: Manifest) -> Manifest:
    inputs = [replace(entry, shape=[1, *entry.shape[1:]], dynamic={}) for entry in manifest.inputs]
    return replace(manifest, inputs=inputs, outputs=[replace(o, shape=[1, 10]) for o in manifest.outputs])


def with_every_datatype(manifest: Manifest) -> Manifest:
    outputs = [Output(name=f"out {dtype}", shape=["batch", "length"], dtype=dtype) for dtype in TRITON_TYPES]
    return replace(manifest, outputs=outputs)


def with_a_number_for_each_sample(manifest: Manifest) -> Manifest:
    return replace(manifest, outputs=[Output(name="score", shape=["batch"], dtype="float32")])


def with_a_scalar(manifest: Manifest) -> Manifest:
    return replace(manifest, outputs=[Output(name="score", shape=[], dtype="float32")])


def with_odd_names(manifest: Manifest) -> Manifest:
    return replace(manifest, outputs=[replace(o, name='a "b" \\ c\'d') for o in manifest.outputs])


def with_shared_calls(manifest: Manifest) -> Manifest:
    return replace(manifest, recommended=replace(manifest.recommended, shared_rows=16))


def with_calls_alone(manifest: Manifest) -> Manifest:
    return replace(manifest, recommended=replace(manifest.recommended, shared_rows=None))


@pytest.mark.parametrize(
    "change",
    [
        as_built, for_openvino, without_a_batch, with_every_datatype, with_a_number_for_each_sample,
        with_odd_names, with_shared_calls, with_calls_alone,
    ],
)  # fmt: skip
def test_triton_accepts_the_configuration_and_looks_for_its_backend(
    build: Path, ask: Ask, change: Callable[[Manifest], Manifest]
) -> None:
    manifest = change(read(build))
    told = "\n".join(ask(manifest, lambda text: text))
    assert f"unable to find backend library for backend '{manifest.runtime}'" in told
    assert "Poll failed" not in told


def test_a_scalar_without_a_batch_has_no_place_in_triton(build: Path, ask: Ask) -> None:
    manifest = with_a_scalar(read(build))
    assert "scalar tensors are not supported" in "\n".join(ask(manifest, lambda text: text))
    assert not triton_takes(manifest)
    assert triton_takes(with_a_number_for_each_sample(read(build)))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("max_batch_size", "largest_batch", "failed to read text proto"),
        ("TYPE_FP32", "TYPE_FLOAT", "failed to read text proto"),
        ("dims: [ 10 ]", "dims: [ 0 ]", "dimension must be integer >= 1"),
        ("dims: [ 10 ]", "dims: [ ]", "must specify 'dims'"),
        ("max_batch_size: 64", "max_batch_size: 8", "preferred size must be <= max batch size"),
        ('name: "digits"', 'name: "other"', "directory name must equal model name"),
        ("KIND_CPU", "KIND_PHONE", "failed to read text proto"),
    ],
)
def test_triton_refuses_a_configuration_that_is_wrong(
    build: Path, ask: Ask, old: str, new: str, reason: str
) -> None:
    told = "\n".join(ask(with_shared_calls(read(build)), lambda text: text.replace(old, new, 1)))
    assert "Poll failed" in told
    assert reason in told
    assert "backend library" not in told
