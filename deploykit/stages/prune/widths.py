"""How many channels stay, and which: the law of rounding, the schedule, local and global ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploykit.stages.prune.groups import Group
from deploykit.stages.prune.options import PruneOptions
from deploykit.stages.prune.patterns import matches

if TYPE_CHECKING:
    import torch

Scores = Mapping[str, "torch.Tensor"]
"""Importance of each channel, by the root of its group; float [channel]."""


def kept_channels(channels: int, ratio: float, round_to: int) -> int:
    """How many of `channels` stay: the multiple of `round_to` nearest to channels * (1 - ratio).

    At least one multiple, at most all; the wider one if two are as near.
    """
    nearest = math.floor(channels * (1 - ratio) / round_to + 0.5) * round_to
    return min(max(nearest, round_to), channels)


def shares(options: PruneOptions) -> tuple[float, ...]:
    """The share of `ratio` that has gone after each step, rising to 1.

    Cubic: 1 - (1 - t)^3 at t of the way (Zhu and Gupta 2017, arXiv:1710.01878, equation 1).
    """
    power = 3 if options.schedule == "cubic" else 1
    return tuple(1 - (1 - n / options.steps) ** power for n in range(1, options.steps + 1))


def ratio_of(group: Group, options: PruneOptions) -> float:
    """The ratio asked of a group."""
    ratios = [
        ratio
        for pattern, ratio in options.ratios.items()
        if any(matches(name, pattern) for name in group.layers)
    ]
    return ratios[-1] if ratios else options.ratio or 0.0


def ranked(score: torch.Tensor, unit: int) -> list[int]:
    """The channels from the least important on; a head's channels stay together.

    A unit of several channels counts by the sum of their scores.
    """
    order = score.reshape(-1, unit).sum(1).argsort(stable=True).tolist()
    return [unit * head + i for head in order for i in range(unit)]


def global_ratios(
    groups: Sequence[Group], scores: Scores, options: PruneOptions
) -> dict[str, float]:
    """The ratio of each group when all channels are ranked together.

    Scores of groups are made alike by their mean (torch-pruning's normalizer), and the weakest
    share of all channels goes, wherever it lies. Patterns in `ratios` go before.
    """
    import torch

    fixed = {g.root: ratio_of(g, options.model_copy(update={"ratio": -1.0})) for g in groups}
    free = [g for g in groups if fixed[g.root] < 0]
    if not free:
        return fixed
    alike = {g.root: scores[g.root] / scores[g.root].mean().clamp_min(1e-30) for g in free}
    everything = torch.cat(list(alike.values())).sort().values
    gone = int((options.ratio or 0.0) * len(everything))
    threshold = everything[gone - 1] if gone else -math.inf
    found = {root: float((score <= threshold).float().mean()) for root, score in alike.items()}
    return {**fixed, **found}
