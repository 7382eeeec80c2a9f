"""NVIDIA's Triton Inference Server, out of the wheel of PyTriton, asked about a model repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "nvidia-pytriton==0.7.0"
SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
FOLDER = "nvidia-pytriton-0.7.0"
PARTS = ("pytriton/tritonserver/bin/", "nvidia_pytriton.libs/")
"""The server and the libraries that it finds beside it; its backends are left out."""
TIMEOUT_S = 60


class NoTritonError(Exception):
    """pip cannot get the server for this machine."""


def obtained(cache: Path) -> Path:
    """The server's program, unpacked in the cache. Raises NoTritonError."""
    program = cache / FOLDER / PARTS[0] / "tritonserver"
    if not program.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        wheel = _downloaded(cache)
        _unpack(wheel, program)
        wheel.unlink()
        print(f"unpacked Triton from {PACKAGE}, sha256 {SHA256}, into {cache / FOLDER}")
    return program


def verdict(program: Path, repository: Path) -> list[str]:
    """What the server says of the models when it starts; without a backend it ends by itself.

    Nothing listens: HTTP, gRPC and metrics are off.
    """
    words = [
        str(program), f"--model-repository={repository}", "--disable-auto-complete-config",
        f"--backend-directory={repository}/none", "--allow-http=false", "--allow-grpc=false",
        "--allow-metrics=false",
    ]  # fmt: skip
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    told = [
        line for line in (ended.stdout + ended.stderr).splitlines() if " model_" in line and line[0] in "IWE"
    ]
    print("\n".join(told))
    return told


def _downloaded(cache: Path) -> Path:
    wanted = cache / "pytriton.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
        "--dest", str(cache), "-r", str(wanted),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoTritonError(f"pip could not download {PACKAGE}: {reason}")
    (wheel,) = cache.glob("nvidia_pytriton-*.whl")
    return wheel


def _unpack(wheel: Path, program: Path) -> None:
    """The program last, as its presence means complete."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(PARTS)]
        for member in sorted(members, key=lambda name: name.endswith("/tritonserver")):
            archive.extract(member, program.parents[3])
    program.chmod(0o755)
