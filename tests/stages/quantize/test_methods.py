"""The methods against references written plainly, on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.stages.quantize.histogram import Histogram
from deploykit.stages.quantize.levels import INT8, UINT8, Levels
from deploykit.stages.quantize.methods import METHODS, Method, calibrate
from deploykit.values import Array

RNG = np.random.default_rng(0)
TAILED = RNG.standard_t(3, 60_000).astype(np.float32)
"""Student's t with 3 degrees of freedom."""
RECTIFIED = np.maximum(TAILED, 0)
BOTH = pytest.mark.parametrize("levels", [UINT8, INT8], ids=["uint8", "int8"])


def ranged(values: Array, method: Method, levels: Levels, percentile: float = 99.99):
    histogram = Histogram()
    histogram.add(values)
    return calibrate(histogram, method, levels, percentile=percentile)


def plain_error(values: Array, low: float, high: float, levels: Levels) -> float:
    """Mean squared error of uint8 or int8 rounding, without the code under test."""
    v = values.astype(np.float64)
    if levels.symmetric:
        scale = max(-low, high) / 127
        return float(np.mean((np.clip(np.round(v / scale), -128, 127) * scale - v) ** 2))
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return float(np.mean(((np.clip(np.round(v / scale) + zero, 0, 255) - zero) * scale - v) ** 2))


def plain_divergence(values: Array, threshold: float, steps: int, width: float) -> float:
    """KL(clipped || quantized) over bins of this width, written as in the talk, with loops."""
    bins = round(threshold / width)
    counts = [0.0] * (int(np.abs(values).max() / width) + 2)
    for v in np.abs(values):
        counts[int(v / width)] += 1
    counts[0] = min(counts[0], counts[1])
    p = counts[:bins]
    outside = sum(counts[bins:])
    q = [0.0] * bins
    groups: dict[int, list[int]] = {}
    for i in range(bins):
        groups.setdefault(i * steps // bins, []).append(i)
    for group in groups.values():
        filled = [i for i in group if p[i] > 0]
        for i in filled:
            q[i] = sum(p[j] for j in group) / len(filled)
    p = [*p[:-1], p[-1] + outside]
    total_p, total_q = sum(p), max(sum(q), 1.0)
    return sum(
        a / total_p * np.log((a / total_p) / max(b / total_q, 1e-12))
        for a, b in zip(p, q, strict=True)
        if a > 0
    )


@BOTH
@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_a_planted_tail_is_really_clipped(method: Method, levels: Levels) -> None:
    histogram = Histogram()
    for number in range(16):
        sample = RNG.standard_normal(60_000).astype(np.float32)
        if number < 2:
            sample[number] = (-40, 40)[number]
        histogram.add(sample)
    low, high = calibrate(histogram, method, levels, percentile=99.99)
    assert (histogram.low, histogram.high) == (-40, 40)
    assert 3 < high < 12
    assert -12 < low < -3


@BOTH
@pytest.mark.parametrize("values", [TAILED, RECTIFIED], ids=["tailed", "rectified"])
def test_mse_is_as_good_as_a_search_on_the_values_themselves(values: Array, levels: Levels) -> None:
    ours = plain_error(values, *ranged(values, "mse", levels), levels)
    fractions = np.linspace(0.02, 1, 50)
    best = min(
        plain_error(values, float(values.min()) * f, float(values.max()) * g, levels)
        for f in fractions
        for g in ([f] if levels.symmetric else fractions)
    )
    assert ours <= best * 1.02
    assert ours < plain_error(values, float(values.min()), float(values.max()), levels)


@pytest.mark.parametrize(
    ("values", "levels", "steps"),
    [(TAILED, INT8, 127), (TAILED, UINT8, 127), (RECTIFIED, UINT8, 255), (RECTIFIED, INT8, 127)],
)
def test_entropy_is_the_least_divergence_of_the_plain_reference(
    values: Array, levels: Levels, steps: int
) -> None:
    histogram = Histogram()
    histogram.add(values)
    threshold = max(map(abs, calibrate(histogram, "entropy", levels, percentile=99.99)))
    ours = plain_divergence(values, threshold, steps, histogram.width)
    for factor in (0.5, 0.8, 0.9, 1.1, 1.25, 2):
        tried = round(threshold * factor / histogram.width / 16) * 16 * histogram.width
        assert ours <= plain_divergence(values, tried, steps, histogram.width) + 1e-9


@BOTH
def test_percentile_leaves_the_asked_share_out_within_a_bin(levels: Levels) -> None:
    histogram = Histogram()
    histogram.add(TAILED)
    low, high = calibrate(histogram, "percentile", levels, percentile=99.0)
    want = np.quantile(TAILED, [0.005, 0.995])
    assert abs(low - want[0]) <= 1.5 * histogram.width
    assert abs(high - want[1]) <= 1.5 * histogram.width


def test_minmax_and_moving_average_are_exact() -> None:
    samples = [RNG.standard_normal(100).astype(np.float32) * k for k in (1, 5, 3)]
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample, binned=False)
    low, high = calibrate(histogram, "minmax", UINT8, percentile=99.99)
    assert (low, high) == (min(s.min() for s in samples), max(s.max() for s in samples))
    low, high = calibrate(histogram, "moving_average", UINT8, percentile=99.99)
    assert low == pytest.approx(np.mean([s.min() for s in samples]), rel=1e-6)
    assert high == pytest.approx(np.mean([s.max() for s in samples]), rel=1e-6)


@BOTH
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-38])
def test_a_constant_tensor_gets_a_range_with_zero_in_it(
    method: Method, levels: Levels, value: float
) -> None:
    low, high = ranged(np.full(100, value, np.float32), method, levels)
    assert low <= 0 <= high
    grid = levels.fitted(low, high)
    assert 0 < grid.scale < np.inf
    assert grid.rounded(np.zeros(1))[0] == 0
    assert grid.rounded(np.array([value]))[0] == pytest.approx(value, rel=0.01, abs=1e-37)


def test_zero_is_a_level_of_every_grid() -> None:
    for low, high in ((-1.234, 5.6), (0, 9), (-3, 0), (-1e-3, 1e3)):
        assert UINT8.fitted(low, high).rounded(np.zeros(1))[0] == 0
