"""MLPerf Tiny's image classifier in its own layer names: c for convolutions, b for batch-norms."""

from torch import Tensor, nn
from torch.nn.functional import pad, relu


def norm(width: int) -> nn.BatchNorm2d:
    """Keras' batch-norm."""
    return nn.BatchNorm2d(width, eps=1e-3)


def padded(x: Tensor) -> Tensor:
    """TensorFlow's "same" padding for a 3 x 3 with stride 2 on an even size: right and bottom only."""
    return pad(x, (0, 1, 0, 1))


class ResNet8(nn.Module):
    """Logits (batch, 10) for pictures (batch, 3, 32, 32) with values 0..255."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.b0 = nn.Conv2d(3, 16, 3, padding=1), norm(16)
        self.c1, self.b1 = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.c2, self.b2 = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.c3, self.b3 = nn.Conv2d(16, 32, 3, stride=2), norm(32)
        self.c4, self.b4 = nn.Conv2d(32, 32, 3, padding=1), norm(32)
        self.c5 = nn.Conv2d(16, 32, 1, stride=2)
        self.c6, self.b5 = nn.Conv2d(32, 64, 3, stride=2), norm(64)
        self.c7, self.b6 = nn.Conv2d(64, 64, 3, padding=1), norm(64)
        self.c8 = nn.Conv2d(32, 64, 1, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = relu(self.b0(self.c0(image)))
        y = relu(self.b1(self.c1(x)))
        x = relu(x + self.b2(self.c2(y)))
        y = relu(self.b3(self.c3(padded(x))))
        x = relu(self.c5(x) + self.b4(self.c4(y)))
        y = relu(self.b5(self.c6(padded(x))))
        x = relu(self.c8(x) + self.b6(self.c7(y)))
        return self.fc(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    """The network without its weights."""
    return ResNet8()
