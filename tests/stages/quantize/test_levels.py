"""Laws of the grids, and weights in levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deploykit.stages.quantize.levels import INT7, INT8, UINT8, Levels
from deploykit.stages.quantize.qdq import SMALLEST_SHARE, integer_weights, weight_scales
from deploykit.values import Array

ALL = pytest.mark.parametrize("levels", [UINT8, INT8, INT7], ids=["uint8", "int8", "int7"])
lows = st.floats(-1e6, 0, width=32)
highs = st.floats(0, 1e6, width=32)
weights = arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32))


def test_the_levels_are_those_of_the_types() -> None:
    assert (UINT8.lowest, UINT8.highest, UINT8.steps) == (0, 255, 255)
    assert (INT8.lowest, INT8.highest) == (-128, 127)
    assert (INT7.lowest, INT7.highest) == (-64, 63)


@ALL
@given(low=lows, high=highs)
def test_zero_is_exact_and_inside_the_range_no_error_exceeds_a_step(
    levels: Levels, low: float, high: float
) -> None:
    grid = levels.fitted(low, high)
    assert 0 < grid.scale < np.inf
    assert grid.scale == float(np.float32(grid.scale))  # what the file can hold
    assert levels.lowest <= grid.zero_point <= levels.highest
    values = np.linspace(low, high, 50)
    error = np.abs(grid.rounded(values) - values)
    assert error.max() <= grid.scale * 1.0001  # half a step, and half of the zero point's rounding
    assert grid.rounded(np.zeros(1))[0] == 0


@ALL
@given(low=lows, high=highs, values=arrays.arrays(np.float64, 9, elements=st.floats(-1e9, 1e9)))
def test_rounding_twice_is_rounding_once_and_keeps_the_order(
    levels: Levels, low: float, high: float, values: Array
) -> None:
    grid = levels.fitted(low, high)
    once = grid.rounded(np.sort(values))
    np.testing.assert_allclose(grid.rounded(once), once, rtol=1e-12)
    assert (np.diff(once) >= 0).all()


@given(low=lows, high=highs)
def test_symmetric_levels_have_no_zero_point_and_cover_the_larger_side(
    low: float, high: float
) -> None:
    grid = INT8.fitted(low, high)
    assert grid.zero_point == 0
    if max(-low, high) > 1e-30:
        assert grid.scale * 127 == pytest.approx(max(-low, high), rel=1e-6)


def test_a_known_grid() -> None:
    grid = UINT8.fitted(-1.0, 1.55)
    assert grid.scale == pytest.approx(0.01)
    assert grid.zero_point == 100
    got = grid.rounded(np.array([-9, -1, 0.014, 0.016, 9]))
    np.testing.assert_allclose(got, [-1, -1, 0.01, 0.02, 1.55], rtol=1e-6)


def test_ties_go_to_even() -> None:
    grid = INT8.fitted(-127, 127)
    assert grid.rounded(np.array([0.5, 1.5, 2.5, -0.5])).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("levels", [INT8, INT7], ids=["int8", "int7"])
@given(values=weights)
def test_no_weight_is_clipped_or_off_by_more_than_half_a_step(
    axis: int | None, levels: Levels, values: Array
) -> None:
    scale = weight_scales(values, axis, levels)
    assert scale.shape == (() if axis is None else (values.shape[axis],))
    assert (scale > 0).all()
    integers = integer_weights(values, scale, axis, levels)
    assert np.abs(integers).max() <= levels.highest
    wide = scale if axis != 0 else scale[:, None]
    assert (np.abs(integers * wide - values) <= wide * 0.5001).all()


def test_a_channel_of_zeros_gets_a_share_of_the_largest_scale() -> None:
    values = np.array([[0, 0], [127, -1]], np.float32)
    scale = weight_scales(values, 0, INT8)
    assert scale.tolist() == [SMALLEST_SHARE, 1.0]
    assert integer_weights(values, scale, 0, INT8).tolist() == [[0, 0], [127, -1]]
    assert weight_scales(np.zeros((2, 2), np.float32), 0, INT8).tolist() == [1, 1]
