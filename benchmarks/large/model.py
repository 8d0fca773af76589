"""A transformer of random weights: 2.5 GB by default, more than protobuf holds."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Self-attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, steps, width = x.shape
        split = self.mix(self.norms[0](x)).view(batch, steps, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        share = (query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((share @ value).transpose(1, 2).reshape(batch, steps, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Net(nn.Module):
    """Token numbers to one vector."""

    def __init__(self, width: int, layers: int, heads: int, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.words(ids)).mean(1)


def make(width: int = 2048, layers: int = 12, heads: int = 16, words: int = 10_000) -> nn.Module:
    torch.manual_seed(0)
    return Net(width, layers, heads, words).eval()
