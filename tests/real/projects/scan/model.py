"""A recurrent reader written with torch's scan: the rows of a digit are its time steps."""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

HIDDEN = 64


class RowReader(nn.Module):
    """Logits (batch, 10) for pictures (batch, 1, 8, 8) with grey values 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, HIDDEN)
        self.remember = nn.Linear(HIDDEN, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 10)

    def forward(self, image: Tensor) -> Tensor:
        def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(row + self.remember(state))
            return state, state.clone()

        rows = self.read(image.squeeze(1)).transpose(0, 1)
        last, _ = scan(step, image.new_zeros(image.shape[0], HIDDEN), rows)
        return self.classifier(last)


def build() -> nn.Module:
    """The network without its weights."""
    return RowReader()
