"""What deploykit is held against: torch-pruning used plainly, and a plain training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

ALPHA, TEMPERATURE = 0.7, 4.0
Batch = tuple[torch.Tensor, torch.Tensor]
Augment = Callable[[dict[str, torch.Tensor], torch.Generator], dict[str, torch.Tensor]]


def prune(teacher: nn.Module, widths: Sequence[int], importance: str, sample: Batch) -> nn.Module:
    """Each stage to a width, by `tp.pruner.BasePruner` with a ratio a stage."""
    model = copy.deepcopy(teacher)
    kinds = {
        "l1": tp.importance.MagnitudeImportance(p=1),
        "l2": tp.importance.MagnitudeImportance(p=2),
        "taylor": tp.importance.TaylorImportance(),
    }
    stages = {24: widths[0], 48: widths[1], 64: widths[2]}
    ratios = {
        layer: 1 - stages[layer.out_channels] / layer.out_channels
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    }
    pruner = tp.pruner.BasePruner(
        model,
        sample[0][:1],
        importance=kinds[importance],
        pruning_ratio=0.5,
        pruning_ratio_dict=ratios,
        ignored_layers=[model.classifier],
    )
    if importance == "taylor":
        F.cross_entropy(model(sample[0]), sample[1]).backward()
    pruner.step()
    return model


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    data: Batch,
    augment: Augment,
    *,
    epochs: int,
    seed: int,
) -> float:
    """Train in place, with the teacher's logits where there is one; returns seconds.

    SGD with Nesterov momentum, one cycle to .05, batch 128, bf16, channels last.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    images, labels = data
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, steps, pct_start=0.15, cycle_momentum=False
    )
    began = time.monotonic()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for rows in order[: len(order) // 128 * 128].split(128):
            x = augment({"images": images[rows]}, rng)["images"]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x).float()
                soft = None
                if teacher is not None:
                    with torch.no_grad():
                        soft = teacher(x).float()
            loss = F.cross_entropy(logits, labels[rows])
            if soft is not None:
                kl = F.kl_div(
                    F.log_softmax(logits / TEMPERATURE, 1),
                    F.log_softmax(soft / TEMPERATURE, 1),
                    reduction="batchmean",
                    log_target=True,
                )
                loss = (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.monotonic() - began


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the exact test that two models are right on the same share of samples."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)
