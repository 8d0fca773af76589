from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deploykit.stages.quantize.histogram import BINS, PICKED, Histogram
from deploykit.values import Array

values = arrays.arrays(
    np.float32,
    st.integers(1, 50),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False).map(
        lambda x: x if abs(x) > 2.0**-60 else 0.0
    ),
)


def seen(*samples: Array) -> Histogram:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    names = ("exponent", "low", "high", "lows", "highs", "samples", "values", "masked")
    alike = all(getattr(one, name) == getattr(other, name) for name in names)
    return alike and bool((one.counts == other.counts).all())


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=8), st.randoms())
def test_the_order_of_the_samples_does_not_matter(samples: list[Array], random: object):
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same(seen(*samples), seen(*shuffled))


@settings(deadline=None)
@given(st.lists(values, min_size=2, max_size=8))
def test_parts_merge_to_the_whole(samples: list[Array]):
    left, right = seen(*samples[::2]), seen(*samples[1::2])
    left.merge(right)
    assert same(left, seen(*samples))


@settings(deadline=None)
@given(values)
def test_counts_equal_a_plain_count_in_the_final_bins(sample: Array):
    histogram = Histogram()
    for value in sorted(sample, key=abs):  # each one may force a merge of bins
        histogram.add(np.array([value]))
    exact = sample.astype(np.float64) / histogram.width
    plain = np.bincount(np.floor(exact).astype(int) + BINS, minlength=2 * BINS)
    assert (histogram.counts == plain).all()


@settings(deadline=None)
@given(values)
def test_the_largest_value_lies_in_the_upper_half_of_the_bins(sample: Array):
    largest = float(np.abs(sample).max())
    histogram = seen(sample)
    if largest > 1e-30:
        assert BINS / 2 * histogram.width <= largest <= BINS * histogram.width


def test_extremes_and_their_means_are_exact():
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal(1000).astype(np.float32) * 10**k for k in (-8, 0, 9)]
    histogram = seen(*samples)
    assert histogram.low == min(float(s.min()) for s in samples)
    assert histogram.high == max(float(s.max()) for s in samples)
    assert math.ldexp(histogram.highs, -149) == math.fsum(float(s.max()) for s in samples)


def test_masks_are_counted_apart():
    histogram = seen(np.array([1, -3.4e38, 2, -np.inf], np.float32))
    assert (histogram.masked, histogram.low, histogram.high) == (2, 1.0, 2.0)
    assert histogram.counts.sum() == 2
    only = seen(np.full(3, -np.inf, np.float32))
    assert (only.masked, only.samples) == (3, 0)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        seen(np.array([1, np.nan], np.float32))


def test_a_large_sample_is_thinned_within_the_stated_error():
    rng = np.random.default_rng(1)
    samples = [rng.standard_normal(10 * PICKED).astype(np.float32) for _ in range(4)]
    histogram = seen(*samples)
    counted = histogram.counts.sum()
    assert 2 * PICKED < counted <= 4 * PICKED
    whole = np.sort(np.concatenate(samples))
    edges = (np.arange(-BINS, BINS) + 1) * histogram.width
    ours = np.cumsum(histogram.counts) / counted
    truth = np.searchsorted(whole, edges) / len(whole)
    assert 0 < np.abs(ours - truth).max() < histogram.share_error < 0.01
    assert histogram.high == float(whole[-1])  # extremes come from all values
    assert same(histogram, seen(*samples[::-1]))


def test_few_values_have_no_error():
    assert seen(np.arange(10, dtype=np.float32)).share_error == 0.0


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=4))
def test_plain_data_gives_an_equal_histogram_back(samples: list[Array]):
    histogram = seen(*samples)
    assert same(Histogram.from_json(json.loads(json.dumps(histogram.to_json()))), histogram)
