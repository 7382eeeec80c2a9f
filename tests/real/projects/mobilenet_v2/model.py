"""MobileNetV2 at width 1.0 for 224 x 224 pictures (Sandler et al. 2018, table 2)."""

from torch import Tensor, nn

# expansion, channels, repeats, stride of the first
STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def conv_norm_act(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its batch-norm and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; added to what came in where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_norm_act(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = conv_norm_act(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Logits (batch, 1000) for pictures (batch, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = 32
        for expansion, channels, repeats, stride in STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(width, channels, expansion=expansion, stride=step))
                width = channels
        self.stem = conv_norm_act(3, 32, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_norm_act(320, 1280, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(image)))
        return self.classifier(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    """The network without its weights."""
    return MobileNetV2()
