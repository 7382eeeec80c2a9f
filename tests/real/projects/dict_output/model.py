"""One trunk and two heads: which digit it is, and whether it is odd."""

from torch import Tensor, nn


def conv_norm_act(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution, its batch-norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class TwoHeads(nn.Module):
    """{"digit": (batch, 10), "odd": (batch, 2)} for pictures (batch, 1, 8, 8) with grey values 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv_norm_act(1, 16), conv_norm_act(16, 32), nn.MaxPool2d(2), conv_norm_act(32, 32)
        )
        self.digit = nn.Linear(32, 10)
        self.odd = nn.Linear(32, 2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.trunk(image).mean(dim=(2, 3))
        return {"digit": self.digit(x), "odd": self.odd(x)}


def build() -> nn.Module:
    """The network without its weights."""
    return TwoHeads()
