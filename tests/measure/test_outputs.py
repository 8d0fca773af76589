from __future__ import annotations

import numpy as np
import pytest

from deploykit.measure import outputs
from deploykit.values import TensorSpec

RNG = np.random.default_rng(0)
LOGITS = [{"y": RNG.standard_normal((2, 10)).astype(np.float32)} for _ in range(3)]
SPECS = (TensorSpec(name="y", dtype="float32", shape=("batch", 10)),)


def times(factor: float):
    return [{"y": feed["y"] * np.float32(factor)} for feed in LOGITS]


def verdict(reference, candidate):
    return outputs.uncorrelated(outputs.cosines(reference, candidate), reference)


def test_a_rounded_output_is_right_and_a_wrong_one_is_named():
    rounded = [{"y": (feed["y"] * 8).round() / 8} for feed in LOGITS]
    assert verdict(LOGITS, rounded) is None
    assert outputs.cosines(LOGITS, LOGITS)["y"] == pytest.approx(1)
    assert "'y' is wrong: its cosine" in verdict(LOGITS, times(-1))
    assert "'y' is wrong" in verdict(LOGITS, times(0))
    assert "'y' is wrong" in verdict(LOGITS, LOGITS[::-1])


def test_nan_correlates_with_nothing_and_is_found():
    broken = [*LOGITS[:2], {"y": LOGITS[2]["y"] * np.float32(np.nan)}]
    assert "'y' is wrong" in verdict(LOGITS, broken)
    assert outputs.not_finite(broken) == "output 'y' has NaN or infinite values"
    assert outputs.not_finite(LOGITS) is None


def test_few_values_and_integers_void_nothing():
    assert verdict([{"y": np.float32([[0.1, -0.1]])}], [{"y": np.float32([[-0.1, 0.1]])}]) is None
    labels = [{"y": np.arange(10)}]
    assert verdict(labels, [{"y": np.zeros(10, np.int64)}]) is None


def test_names_and_shapes_must_be_the_references():
    assert outputs.mismatch(LOGITS, LOGITS, SPECS) is None
    assert "['z']" in outputs.mismatch(LOGITS, [{"z": LOGITS[0]["y"]}], SPECS)
    cut = [{"y": LOGITS[0]["y"][:, 1:]}]
    assert "(2, 9), the baseline's (2, 10)" in outputs.mismatch(LOGITS, cut, SPECS)


def test_shapes_that_depend_on_the_data_are_left_out():
    found = (TensorSpec(name="y", dtype="float32", shape=("batch", "boxes")),)
    cut = [{"y": feed["y"][:, 1:]} for feed in LOGITS]
    assert outputs.mismatch(LOGITS, cut, found) is None
    assert outputs.cosines(LOGITS, cut) == {}


def test_a_session_must_give_the_same_again():
    assert outputs.changed(LOGITS, times(1.0001)) is None
    assert outputs.changed(LOGITS, times(1.1)) == (
        "output 'y' changed between the first run and the last"
    )
    assert outputs.changed(LOGITS, times(float("nan"))) is not None
    assert outputs.changed(LOGITS, [{"y": feed["y"][:1]} for feed in LOGITS]) is not None
    flags = [{"y": np.array([True, False])}]
    assert outputs.changed(flags, [{"y": np.array([True, True])}]) is not None
    assert outputs.changed(flags, flags) is None
