"""Flips and shifts of up to two pixels: the augmentation of all rows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

BLACK = -0.286 / 0.353


def flip_and_shift(
    inputs: dict[str, torch.Tensor], rng: torch.Generator
) -> dict[str, torch.Tensor]:
    images = inputs["images"]
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    images = torch.where(flip, images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), value=BLACK)
    shifts = torch.randint(0, 5, (len(images), 2), generator=rng)
    rows = shifts[:, 0, None] + torch.arange(28)
    columns = shifts[:, 1, None] + torch.arange(28)
    index = torch.arange(len(images))[:, None, None]
    return {"images": padded[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)}
