"""What each step of a run took of the score."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploykit.report.summary import RunSummary


def step_by_step(summary: RunSummary) -> str:
    """What each step took of the score or gave back, from the model to what ships."""
    family = (summary.verdict.ship or "").partition(".")[0]
    scores: dict[str, float] = {}
    for row in summary.rows:
        begins, _, rest = row.name.partition(".")
        on_the_way = begins == family or (family != "model" and not rest)
        if on_the_way and (row.name not in scores or row.backend == summary.target):
            scores[row.name] = row.score.value
    if len(scores) < 3:
        return ""
    told = [
        f"{name} {after - before:+.4f}"
        for (_, before), (name, after) in itertools.pairwise(scores.items())
    ]
    return f" Step by step: {', '.join(told)}."
