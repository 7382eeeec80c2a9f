"""A small residual network of depthwise-separable convolutions for 8 x 8 pictures of digits."""

import torch
from torch import Tensor, nn

CLASSES = 10


class ConvNormAct(nn.Sequential):
    """A convolution, its batch-norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class SeparableBlock(nn.Module):
    """A depthwise 3 x 3 and a pointwise convolution, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = ConvNormAct(width, 2 * width, 1)
        self.depthwise = ConvNormAct(2 * width, 2 * width, 3, groups=2 * width)
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.project(self.depthwise(self.expand(x))))


class DigitNet(nn.Module):
    """Logits (batch, 10) for pictures (batch, 1, 8, 8) whose grey values lie in 0..1."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = ConvNormAct(1, width, 3)
        self.block1 = SeparableBlock(width)
        self.widen = ConvNormAct(width, 2 * width, 3)
        self.pool = nn.MaxPool2d(2)
        self.block2 = SeparableBlock(2 * width)
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.block1(self.stem(image))
        x = self.block2(self.pool(self.widen(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    """The network as train.py trains it, without its weights."""
    return DigitNet()
