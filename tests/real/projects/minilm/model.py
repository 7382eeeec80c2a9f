"""all-MiniLM-L6-v2: a sentence encoder whose answer is the normalised mean of its token states."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel


class SentenceEncoder(nn.Module):
    """Unit vectors (batch, 384) for token ids and their mask, both int64 (batch, 64)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return torch.nn.functional.normalize(mean, dim=1)


def build() -> nn.Module:
    """The encoder that config.json describes, without its weights."""
    config = AutoConfig.from_pretrained(Path(__file__).parent / "encoder")
    return SentenceEncoder(AutoModel.from_config(config, add_pooling_layer=False))
