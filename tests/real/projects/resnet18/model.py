"""ResNet-18 for 224 x 224 pictures (He et al. 2016, table 1)."""

from itertools import pairwise

from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch-norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, 3, stride)
        self.conv2 = conv_norm(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """Logits (batch, 1000) for pictures (batch, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        widths = [64, 64, 128, 256, 512]
        pairs = pairwise(widths)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(inputs, outputs, 1 + (index > 0)), BasicBlock(outputs, outputs, 1))
                for index, (inputs, outputs) in enumerate(pairs)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(image))).flatten(1))


def build() -> nn.Module:
    """The network without its weights."""
    return ResNet18()
