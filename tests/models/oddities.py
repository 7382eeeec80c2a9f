"""Tiny networks, each named for what makes it hard to prune.

All take one float32 tensor of the shape in `EXAMPLES` and give logits for ten classes, unless said
otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def conv_norm(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch-norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Headed(nn.Module):
    """A stem, whatever `body` does, the mean over the picture and a classifier."""

    def __init__(self, width: int, *, stem: int | None = None) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem or width)
        self.classifier = nn.Linear(width, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(image)))
        return self.classifier(x.mean(dim=(2, 3)))


class Plain(Headed):
    """Nothing odd: three convolutions in a row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.one = conv_norm(width, width)
        self.two = conv_norm(width, width)
        self.three = conv_norm(width, width)

    def body(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two, self.three):
            x = torch.relu(layer(x))
        return x


class Residual(Headed):
    """Two blocks whose outputs are added to what came in: the trunk must shrink together."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(width, stem=8)
        self.enter = conv_norm(8, width)
        self.inner = nn.ModuleList(conv_norm(width, width) for _ in range(2))
        self.outer = nn.ModuleList(conv_norm(width, width) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = torch.relu(x + outer(torch.relu(inner(x))))
        return x


class Concat(Headed):
    """Two branches side by side, of different width, then a convolution over both."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.left = conv_norm(8, 16)
        self.right = conv_norm(8, 24, 1)
        self.both = conv_norm(40, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], dim=1)
        return torch.relu(self.both(x))


class ConcatResidual(Headed):
    """A trunk that is added to two branches side by side: each half is tied to one branch."""

    def __init__(self) -> None:
        super().__init__(32, stem=8)
        self.enter = conv_norm(8, 32)
        self.left = conv_norm(32, 16)
        self.right = conv_norm(32, 16)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return torch.relu(x + torch.cat([self.left(x), self.right(x)], dim=1))


class Depthwise(Headed):
    """A depthwise-separable block with an expansion."""

    def __init__(self) -> None:
        super().__init__(24, stem=16)
        self.expand = conv_norm(16, 48, 1)
        self.depthwise = conv_norm(48, 48, groups=48)
        self.project = conv_norm(48, 24, 1)

    def body(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.expand(x))
        return self.project(functional.relu6(self.depthwise(x)))


class DepthMultiplier(Headed):
    """A depthwise convolution with two outputs for each input."""

    def __init__(self) -> None:
        super().__init__(32, stem=8)
        self.enter = conv_norm(8, 16)
        self.multiply = conv_norm(16, 32, groups=16)
        self.mix = conv_norm(32, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.multiply(torch.relu(self.enter(x))))
        return torch.relu(self.mix(x))


class GroupedConv(Headed):
    """A convolution in four groups of eight."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__(24, stem=8)
        self.enter = conv_norm(8, 32)
        self.grouped = conv_norm(32, 64, groups=groups)
        self.leave = conv_norm(64, 24, 1)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.enter(x))))
        return torch.relu(self.leave(x))


class ManyGroups(GroupedConv):
    """A convolution in sixteen groups of two: whole groups go."""

    def __init__(self) -> None:
        super().__init__(groups=16)


class SqueezeExcite(Headed):
    """A gate by channel, computed from the channels it gates."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.enter = conv_norm(8, 32)
        self.squeeze = nn.Conv2d(32, 16, 1)
        self.excite = nn.Conv2d(16, 32, 1)
        self.leave = conv_norm(32, 24, 1)

    def body(self, x: Tensor) -> Tensor:
        x = functional.silu(self.enter(x))
        gate = self.excite(torch.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True))))
        return torch.relu(self.leave(x * torch.sigmoid(gate)))


class SharedWeights(Headed):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.enter = conv_norm(8, 24)
        self.shared = nn.Conv2d(24, 24, 3, padding=1)
        self.leave = conv_norm(24, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return torch.relu(self.leave(x))


class TiedWeights(Headed):
    """Two convolutions with one weight; their biases differ."""

    def __init__(self) -> None:
        super().__init__(24, stem=24)
        self.one = nn.Conv2d(24, 24, 3, padding=1)
        self.two = nn.Conv2d(24, 24, 3, padding=1)
        self.two.weight = self.one.weight
        self.three = conv_norm(24, 32)
        self.four = conv_norm(32, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return torch.relu(self.four(torch.relu(self.three(x))))


class TransposedConv(Headed):
    """Down and up again by a transposed convolution, plain and in groups."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.down = conv_norm(8, 32, stride=2)
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(24, 32, 2, stride=2, groups=2)
        self.leave = conv_norm(32, 24, 1)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.down(x))))
        return torch.relu(self.leave(torch.relu(self.up_grouped(x))))


class Conv1dNet(nn.Module):
    """Sound: one-dimensional convolutions over (batch, 8, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 16, 5, padding=2)
        self.one = nn.Conv1d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.two = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.slope = nn.PReLU(32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, sound: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(torch.relu(self.stem(sound)))))
        return self.classifier(self.slope(self.two(x)).mean(dim=2))


class Conv3dNet(nn.Module):
    """Volumes: (batch, 1, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.one = nn.Conv3d(8, 24, 3, padding=1)
        self.two = nn.Conv3d(24, 16, 3, padding=1)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, volume: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(volume))))))
        return self.classifier(x.mean(dim=(2, 3, 4)))


class Flattened(nn.Module):
    """A classifier of two linear layers over the flattened picture: 16 inputs for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.one = conv_norm(8, 24, stride=2)
        self.hidden = nn.Linear(24 * 16, 48)
        self.classifier = nn.Linear(48, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(image))))
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 4), 1)
        return self.classifier(torch.relu(self.hidden(x)))


class HardCodedView(nn.Module):
    """The flattened size is written into forward as a number: nothing before it can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.one = conv_norm(8, 32, stride=2)
        self.classifier = nn.Linear(512, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(image))))
        return self.classifier(functional.adaptive_avg_pool2d(x, 4).view(-1, 512))


class FrozenWeights(Plain):
    """No parameter requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's option A (He et al. 2016): the shortcut is sliced and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.enter = conv_norm(8, 16)
        self.inner = conv_norm(16, 32, stride=2)
        self.outer = conv_norm(32, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.enter(torch.relu(self.stem(image))))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = torch.relu(shortcut + self.outer(torch.relu(self.inner(x))))
        return self.classifier(x.mean(dim=(2, 3)))


class GroupNormed(Headed):
    """Group norm: eight groups of four channels."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.enter = nn.Conv2d(8, 32, 3, padding=1)
        self.norm = nn.GroupNorm(8, 32)
        self.leave = conv_norm(32, 24)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.leave(torch.relu(self.norm(self.enter(x)))))


class LayerNormed(nn.Module):
    """Linear layers over (batch, 32) with a layer norm, which mixes its channels; what is inside may go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(32, 32)
        self.enter = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        self.expand = nn.Linear(48, 96)
        self.shrink = nn.Linear(96, 48)
        self.classifier = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.enter(torch.relu(self.stem(x))))
        return self.classifier(x + self.shrink(functional.gelu(self.expand(x))))


class Recurrent(nn.Module):
    """A convolution before an LSTM: (batch, 8, 32) -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 16, 3, padding=1)
        self.one = nn.Conv1d(16, 32, 3, padding=1)
        self.two = nn.Conv1d(32, 16, 3, padding=1)
        self.memory = nn.LSTM(16, 16, batch_first=True)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, sound: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(sound))))))
        hidden, _ = self.memory(x.transpose(1, 2))
        return self.classifier(hidden[:, -1])


class Split(Headed):
    """Channels are split in two halves that go different ways and meet again in a product."""

    def __init__(self) -> None:
        super().__init__(16, stem=8)
        self.enter = conv_norm(8, 32)
        self.leave = conv_norm(16, 16)

    def body(self, x: Tensor) -> Tensor:
        value, gate = self.enter(x).chunk(2, dim=1)
        return torch.relu(self.leave(value * torch.sigmoid(gate)))


class ChannelShuffle(Headed):
    """Channels change places by a reshape between two grouped convolutions (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.enter = conv_norm(8, 32)
        self.leave = conv_norm(32, 24, groups=2)
        self.inner = conv_norm(24, 48)
        self.last = conv_norm(48, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        batch, channels, height, width = x.shape
        x = (
            x.view(batch, 2, channels // 2, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        x = torch.relu(self.leave(x))
        return torch.relu(self.last(torch.relu(self.inner(x))))


class LayerScale(Headed):
    """A free parameter scales the channels of a residual branch; it starts near zero."""

    def __init__(self) -> None:
        super().__init__(24, stem=8)
        self.enter = conv_norm(8, 24)
        self.inner = conv_norm(24, 48)
        self.outer = conv_norm(48, 24)
        self.scale = nn.Parameter(torch.full((1, 24, 1, 1), 1e-6))

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return torch.relu(x + self.scale * self.outer(torch.relu(self.inner(x))))


class ZeroGamma(Residual):
    """The last batch-norm of each branch starts at zero, which hides what the branch computes."""

    def __init__(self) -> None:
        super().__init__()
        for outer in self.outer:
            nn.init.zeros_(outer[1].weight)


@dataclass
class Detection:
    """A dataclass of outputs."""

    logits: Tensor
    boxes: Tensor


class DataclassOutput(nn.Module):
    """Two heads: a dictionary inside a dataclass would work as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.one = conv_norm(8, 32)
        self.two = conv_norm(32, 32)
        self.logits = nn.Conv2d(32, CLASSES, 1)
        self.boxes = nn.Conv2d(32, 4, 1)

    def forward(self, image: Tensor) -> Detection:
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(image))))))
        return Detection(logits=self.logits(x).mean(dim=(2, 3)), boxes=self.boxes(x))


class TwoInputs(nn.Module):
    """A picture and a vector, each with a first layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = conv_norm(3, 16)
        self.vector = nn.Linear(6, 16)
        self.one = conv_norm(16, 32)
        self.hidden = nn.Linear(48, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.picture(image)))).mean(dim=(2, 3))
        x = torch.cat([x, torch.relu(self.vector(facts))], dim=1)
        return self.classifier(torch.relu(self.hidden(x)))


PICTURE = ((2, 3, 8, 8),)
EXAMPLES: dict[type[nn.Module], tuple[tuple[int, ...], ...]] = {
    Plain: PICTURE,
    Residual: PICTURE,
    Concat: PICTURE,
    ConcatResidual: PICTURE,
    Depthwise: PICTURE,
    DepthMultiplier: PICTURE,
    GroupedConv: PICTURE,
    ManyGroups: PICTURE,
    SqueezeExcite: PICTURE,
    SharedWeights: PICTURE,
    TiedWeights: PICTURE,
    TransposedConv: PICTURE,
    Conv1dNet: ((2, 8, 64),),
    Conv3dNet: ((2, 1, 8, 8, 8),),
    Flattened: PICTURE,
    HardCodedView: PICTURE,
    FrozenWeights: PICTURE,
    PaddedShortcut: PICTURE,
    GroupNormed: PICTURE,
    LayerNormed: ((2, 32),),
    Recurrent: ((2, 8, 32),),
    Split: PICTURE,
    ChannelShuffle: PICTURE,
    LayerScale: PICTURE,
    ZeroGamma: PICTURE,
    DataclassOutput: PICTURE,
    TwoInputs: ((2, 3, 8, 8), (2, 6)),
}


def settled(kind: type[nn.Module], *, seed: int = 0) -> nn.Module:
    """A seeded instance in evaluation mode whose batch-norms have seen data: no statistic is trivial."""
    torch.manual_seed(seed)
    module = kind()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and kind is not ZeroGamma:
                part.weight.copy_(torch.rand(part.weight.shape, generator=generator) + 0.5)
                part.bias.copy_(torch.rand(part.bias.shape, generator=generator) - 0.5)
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) * 0.2)
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return module.eval()


def example(kind: type[nn.Module], *, seed: int = 1) -> tuple[Tensor, ...]:
    """Seeded inputs for the network, two samples."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in EXAMPLES[kind])
