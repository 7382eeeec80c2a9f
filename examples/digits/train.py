"""Trains the digit network and writes digits.safetensors: `python train.py [EPOCHS]`, some 20 seconds."""

import sys
from pathlib import Path

import numpy as np
import torch
from model import build
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent


def load(part: str) -> tuple[Tensor, Tensor]:
    """Pictures scaled to 0..1, as deploy.toml's preprocessing does, and their labels."""
    with np.load(HERE / f"{part}.npz") as arrays:
        return torch.from_numpy(arrays["image"]).float() * 0.0625, torch.from_numpy(arrays["label"])


def train(epochs: int = 30, seed: int = 0) -> nn.Module:
    """The network after AdamW with a one-cycle rate; the same seed gives the same network."""
    torch.manual_seed(seed)
    images, labels = load("train")
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    steps = -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(
                model(shifted(images[batch])), labels[batch], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """The pictures moved by up to one pixel, all alike."""
    right, down = (int(step) for step in torch.randint(-1, 2, (2,)))
    return torch.roll(images, (down, right), dims=(2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, part: str = "evaluation") -> float:
    """The share of pictures of one part that the network names rightly."""
    images, labels = load(part)
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    save_file(trained.state_dict(), HERE / "digits.safetensors")
    print(f"accuracy on evaluation.npz: {accuracy(trained):.4f}")
