"""Calibration methods: from what a tensor's values were to the range that gets the levels.

All take the same histogram; what is clipped saturates. The resolution of a threshold is a bin, at
most 1/2048 of the largest magnitude, for percentile; entropy tries every ENTROPY_STEP-th bin and
mse MSE_STEPS thresholds up to the extreme; minmax and moving_average are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from deploykit.stages.quantize.histogram import BINS, Histogram
from deploykit.stages.quantize.levels import Levels
from deploykit.values import Array

Method = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
EXACT: frozenset[Method] = frozenset({"minmax", "moving_average"})
"""They need the extremes alone, which are exact."""
Range = tuple[float, float]

ENTROPY_STEP = 16
"""Bins between the thresholds that entropy tries."""
MSE_STEPS = 128
"""Thresholds that mse tries on each side, evenly spaced up to the extreme."""


def calibrate(seen: Histogram, method: Method, levels: Levels, *, percentile: float) -> Range:
    """The range (low <= 0 <= high) of a tensor by a method. `percentile` is in percent."""
    if method == "minmax":
        low, high = seen.low, seen.high
    elif method == "moving_average":
        low, high = _moving_average(seen)
    elif method == "percentile":
        low, high = _percentile(seen, percentile / 100)
    else:
        low, high = _SEARCHED[method](seen, levels)
    return min(float(low), 0.0), max(float(high), 0.0)


def _moving_average(seen: Histogram) -> Range:
    """Mean over the samples of the smallest and of the largest value of each."""
    scale = 2.0**-149 / max(seen.samples, 1)
    return float(seen.lows) * scale, float(seen.highs) * scale


def _percentile(seen: Histogram, share: float) -> Range:
    """The edges of bins that leave at most (1 - share) / 2 of the values out on each side."""
    cut = (1 - share) / 2 * seen.counts.sum()
    below, above = np.cumsum(seen.counts), np.cumsum(seen.counts[::-1])
    first = int(np.searchsorted(below, cut, side="right"))
    last = int(np.searchsorted(above, cut, side="right"))
    low, high = (first - BINS) * seen.width, (BINS - last) * seen.width
    return max(low, seen.low), min(high, seen.high)


def _entropy(seen: Histogram, levels: Levels) -> Range:
    """The threshold on |x| whose quantized distribution diverges least from the clipped one.

    Kullback-Leibler divergence after Migacz, "8-bit Inference with TensorRT" (GTC 2017). As in
    NVIDIA's pytorch-quantization the bin at zero counts like its neighbour: zero is exact on every
    grid.
    """
    counts = seen.magnitudes().astype(np.float64)
    counts[0] = min(counts[0], counts[1])
    steps = levels.steps if seen.low >= 0 and not levels.symmetric else levels.steps // 2
    end = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if end <= steps:
        return seen.low, seen.high
    tried = sorted({*range(steps, end, ENTROPY_STEP), end})
    best = min(tried, key=lambda bins: _divergence(counts, bins, steps))
    limit = best * seen.width
    return max(seen.low, -limit), min(seen.high, limit)


def _divergence(counts: Array, bins: int, steps: int) -> float:
    """KL(P || Q): P the first bins with outliers in the last, Q those bins in `steps` levels."""
    inside = counts[:bins]
    clipped = inside.copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * steps // bins
    filled = inside > 0
    mass = np.bincount(level, weights=inside, minlength=steps)
    spread = np.bincount(level, weights=filled, minlength=steps)
    with np.errstate(invalid="ignore", divide="ignore"):
        quantized = np.where(filled, (mass / spread)[level], 0.0)
    p, q = clipped / clipped.sum(), quantized / max(quantized.sum(), 1.0)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))


def _mse(seen: Histogram, levels: Levels) -> Range:
    """The range with the least mean squared error of quantizing, clipping and rounding together.

    Both sides are searched in turn, the other one held, until neither moves.
    """
    values, counts = seen.occupied()
    fractions = np.arange(1, MSE_STEPS + 1) / MSE_STEPS

    def error(low: float, high: float) -> float:
        return float(counts @ (levels.fitted(low, high).rounded(values) - values) ** 2)

    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if levels.symmetric:
        limit = max(-low, high)
        limit = min((limit * f for f in fractions), key=lambda t: error(-t, t), default=limit)
        return max(low, -limit), min(high, limit)
    for _ in range(3):
        before = low, high
        if seen.high > 0:
            high = min((seen.high * f for f in fractions), key=lambda t: error(low, t))
        if seen.low < 0:
            low = min((seen.low * f for f in fractions), key=lambda t: error(t, high))
        if before == (low, high):
            break
    return low, high


_SEARCHED: dict[str, Callable[[Histogram, Levels], Range]] = {"entropy": _entropy, "mse": _mse}
METHODS: tuple[Method, ...] = ("minmax", "moving_average", "percentile", "entropy", "mse")
