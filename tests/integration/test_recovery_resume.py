"""Recovery killed with SIGKILL in mid-training continues to the very bytes of an undisturbed run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from deploy.recovery import finetune

folder, die_after = Path(sys.argv[1]), int(sys.argv[2])
finetune.CHECKPOINT_SECONDS = 0.0
torch.set_num_threads(1)
torch.manual_seed(0)

def network(inner):
    return nn.Sequential(
        nn.Linear(8, inner), nn.BatchNorm1d(inner), nn.ReLU(), nn.Dropout(0.3), nn.Linear(inner, 4)
    )

teacher, student = network(16), network(6)
inputs = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
labels = inputs[:, :4].argmax(axis=1)
steps = 0

def told(progress):
    global steps
    steps += 1
    with (folder / "steps").open("a") as file:
        file.write(f"{progress.step}\\n")
    if steps == die_after:
        os.kill(os.getpid(), signal.SIGKILL)

result = finetune.recover(
    student, teacher, finetune.TrainingData(inputs={"x": inputs}, labels=labels),
    epochs=4, learning_rate=1e-2, batch_size=16, seed=1, checkpoint=folder / "c.pt", on_progress=told,
)
save_file(result.module.state_dict(), folder / "result.safetensors")
(folder / "history").write_text(repr(result.history))
"""


def train(folder: Path, die_after: int = 0) -> int:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(die_after)],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize("deaths", [(1,), (10, 4)])
def test_killed_training_ends_in_the_same_bytes(tmp_path: Path, deaths: tuple[int, ...]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole) == 0
    for die_after in deaths:
        assert train(broken, die_after) == -signal.SIGKILL
        assert not (broken / "result.safetensors").exists()
    assert train(broken) == 0
    assert (broken / "result.safetensors").read_bytes() == (whole / "result.safetensors").read_bytes()
    assert (broken / "history").read_text() == (whole / "history").read_text()
    # Work was continued, not begun again: at most one step is repeated at each death.
    taken = len((broken / "steps").read_text().split())
    needed = len((whole / "steps").read_text().split())
    assert needed <= taken <= needed + len(deaths)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole) == 0
    assert train(broken, 9) == -signal.SIGKILL
    (broken / "c.pt.partial").write_bytes(b"half a checkpoint")
    assert train(broken) == 0
    assert (broken / "result.safetensors").read_bytes() == (whole / "result.safetensors").read_bytes()
