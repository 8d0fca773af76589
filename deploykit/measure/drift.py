"""Times that move one way: while an engine warms up, and over a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import numpy as np

from deploykit.measure.result import MIN_BLOCKS
from deploykit.values import Array, Measurement

DRIFT_WINDOWS = 18


def trend(measurement: Measurement) -> tuple[float, float] | None:
    """First and last level in nanoseconds of times that moved one way over a run, or None.

    The thirds of the block medians step in one direction, 5 % together, and their middle halves do
    not overlap. None for fewer than MIN_BLOCKS blocks.
    """
    if len(measurement.blocks_ns) < MIN_BLOCKS:
        return None
    return _moved(
        np.log([np.median(block) for block in measurement.blocks_ns]), each=0.02, whole=0.05
    )


def drift(medians: Sequence[int]) -> tuple[float, float] | None:
    """First and last level of window medians that still move one way at the end, or None.

    The thirds of the later half must step in one direction, 5 % each and 20 % together, and their
    middle halves must not overlap: noise has no direction, and the one step of a busy neighbour is
    no drift. Fewer than DRIFT_WINDOWS in that half tell nothing.
    """
    late = np.log(medians[len(medians) // 2 :])
    if len(late) < DRIFT_WINDOWS:
        return None
    return _moved(late, each=0.05, whole=0.2)


def _moved(logs: Array, *, each: float, whole: float) -> tuple[float, float] | None:
    """First and last level where thirds step one way, by these shares, and do not overlap."""
    low, level, high = np.transpose(
        [np.quantile(third, (0.25, 0.5, 0.75)) for third in np.array_split(logs, 3)]
    )
    steps = np.diff(level)
    up = (steps > log(1 + each)).all() and (low[1:] > high[:-1]).all()
    down = (steps < -log(1 + each)).all() and (high[1:] < low[:-1]).all()
    one_way = (up or down) and abs(steps.sum()) > log(1 + whole)
    return (exp(level[0]), exp(level[2])) if one_way else None
