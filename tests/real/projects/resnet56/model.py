"""The CIFAR ResNet of 56 layers (He et al. 2016, section 4.2) with shortcuts of kind A: no parameters."""

from torch import Tensor, nn
from torch.nn.functional import pad, relu

BLOCKS = 9


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut that drops pixels and adds empty channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, with zero channels before and after."""
        if self.stride == 1:
            return x
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Logits (batch, 10) for normalised pictures (batch, 3, 32, 32)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, blocks, stride=1)
        self.layer2 = stage(16, 32, blocks, stride=2)
        self.layer3 = stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Blocks of one width; the first changes the width and the size."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def build() -> nn.Module:
    """The network without its weights."""
    return ResNet(BLOCKS)
