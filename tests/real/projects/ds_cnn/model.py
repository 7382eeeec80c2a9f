"""A keyword network of depthwise-separable convolutions (Zhang et al. 2017, "Hello Edge", DS-CNN-S)."""

import torch
from torch import Tensor, nn

WIDTH = 64
DIGITS = 10


def norm_act(width: int) -> list[nn.Module]:
    """Batch-norm and ReLU."""
    return [nn.BatchNorm2d(width), nn.ReLU()]


def separable(width: int) -> nn.Sequential:
    """A depthwise 3 x 3 and a pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        *norm_act(width),
        nn.Conv2d(width, width, 1, bias=False),
        *norm_act(width),
    )


class DSCNN(nn.Module):
    """Logits (batch, 10) for normalised log-mel pictures (batch, 1, 49, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTH, (10, 4), stride=2, padding=(5, 1), bias=False), *norm_act(WIDTH)
        )
        self.blocks = nn.Sequential(*(separable(WIDTH) for _ in range(4)))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(WIDTH, DIGITS)

    def forward(self, sound: Tensor) -> Tensor:
        x = torch.mean(self.blocks(self.stem(sound)), dim=(2, 3))
        return self.classifier(self.dropout(x))


def build() -> nn.Module:
    """The network without its weights."""
    return DSCNN()
