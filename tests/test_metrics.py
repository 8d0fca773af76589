from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from deploykit import metrics
from deploykit.errors import InputError, UsageError
from deploykit.metrics import (
    METRICS,
    cosine,
    differences,
    drop,
    least_drop,
    mean_interval,
    score,
    sqnr_db,
)
from deploykit.values import Array, Difference, Interval, Score
from tests.fixtures_core import refused

RNG = np.random.default_rng(0)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9) | st.integers(20, 40))
VALUES = st.floats(-100, 100).map(lambda x: x if abs(x) > 1e-6 else 0.0)
LOGITS = SIZES.flatmap(lambda size: hnp.arrays(np.float32, size, elements=st.integers(-3, 3)))
"""Few values: many ties, as INT8 outputs have them."""
PAIRS = hnp.array_shapes(max_dims=3, max_side=4).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float64, shape, elements=VALUES)] * 2)
)


def top_k(logits: Array, target: Array, k: int) -> list[float]:
    """By sorting Python lists: largest value first, of equal values the first class."""
    found = []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        found.append(float(label in ranked[:k]))
    return found


def scored(metric: str, output: Any, target: Any = None, reference: Any = None) -> Score:
    given_reference = None if reference is None else {"y": np.asarray(reference)}
    target = None if target is None else np.asarray(target)
    return score(metric, {"y": np.asarray(output)}, target, given_reference)


# --- top-k


@pytest.mark.parametrize(("metric", "k"), [("top1", 1), ("top5", 5)])
@given(LOGITS, st.data())
def test_top_k_is_the_share_of_labels_among_the_k_largest(
    metric: str, k: int, logits: Array, data: st.DataObject
) -> None:
    n, classes = logits.shape
    target = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    found = scored(metric, logits, target)
    assert found.per_sample == tuple(top_k(logits, target, k))
    assert found.score.value == pytest.approx(np.mean(found.per_sample))
    assert (found.metric, found.samples) == (metric, n)


@given(LOGITS)
def test_top1_is_agreement_with_ones_own_labels(logits: Array) -> None:
    assume(logits.shape[1] > 1)
    labels = logits.argmax(1)
    other = np.roll(logits, 1, 1)
    assert scored("top1", other, labels).per_sample == (
        scored("agreement", other, reference=logits).per_sample
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.bool_, np.float16, np.float64])
def test_outputs_of_any_dtype_are_ranked(dtype: Any) -> None:
    logits = np.array([[0, 1, 0], [1, 0, 0]]).astype(dtype)
    assert scored("top1", logits, [1, 0]).score.value == 1
    low = np.array([[-128, 127], [127, -128]], np.int8)
    assert scored("top1", low, [1, 0]).score.value == 1


def test_any_of_several_labels_is_accepted() -> None:
    logits = np.eye(4)
    assert scored("top1", logits, [[0, 3], [0, 1], [0, 1], [3, 3]]).per_sample == (1, 1, 0, 1)
    assert scored("top1", logits, [[0], [0], [2], [2]]).per_sample == (1, 0, 1, 0)
    filled_up = [[0, -1], [0, 1], [9, 2], [3, -1]]
    assert scored("top1", logits, filled_up).per_sample == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        (np.eye(3, dtype=int), "one-hot"),
        (np.array([0.0, 1.0, 2.0]), "float64[3]"),
        (np.array(["a", "b", "c"]), "<U1[3]"),
        (np.array([0, 1]), "int64[2]"),
        (np.array([True, False, True]), "bool[3]"),
        (np.array([1, 2, 3]), "from 1 to 3"),
        (np.array([-1, 0, 1]), "from -1 to 1"),
        (np.array([[0, 1], [2, -1], [-1, -1]]), "from -1 to 2"),
    ],
)
def test_what_is_no_label_is_refused(target: Array, fact: str) -> None:
    with refused(InputError, fact, "[3, 3]", hint="one integer a sample"):
        scored("top1", np.eye(3), target)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 2)])
def test_top_k_is_of_classes(shape: tuple[int, ...]) -> None:
    with refused(InputError, f"{len(shape)} axes", hint="choose another metric"):
        scored("top5", np.zeros(shape), [0] * 4)


# --- comparing with a reference


def test_agreement_is_the_share_of_equal_argmax() -> None:
    a, b = RNG.normal(size=(2, 50, 3, 4))
    found = scored("agreement", a, reference=b)
    want = [np.mean([p.argmax() == q.argmax() for p, q in zip(x, y, strict=True)])
            for x, y in zip(a, b, strict=True)]  # fmt: skip
    assert found.per_sample == pytest.approx(want)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_agreement_on_one_value_a_sample_means_nothing(shape: tuple[int, ...]) -> None:
    with refused(InputError, f"{shape}", hint="cosine"):
        scored("agreement", np.zeros(shape), reference=np.ones(shape))


@pytest.mark.parametrize("metric", ["cosine", "sqnr"])
@given(PAIRS)
def test_distances_are_taken_for_each_sample(metric: str, pair: tuple[Array, Array]) -> None:
    output, reference = pair
    found = scored(metric, output, reference=reference)
    measure = cosine if metric == "cosine" else lambda c, r: sqnr_db(r, c)
    want = tuple(measure(c, r) for c, r in zip(output, reference, strict=True))
    assert found.per_sample == pytest.approx(want, rel=1e-9)
    assert not any(map(math.isnan, found.per_sample or ()))


@given(PAIRS)
def test_cosine_is_that_of_the_flat_vectors(pair: tuple[Array, Array]) -> None:
    a, b = pair
    x, y = a.ravel().tolist(), b.ravel().tolist()
    found = cosine(a, b)
    assert -1 <= found <= 1
    if any(x) and any(y):
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        assert found == pytest.approx(dot / (math.hypot(*x) * math.hypot(*y)), abs=1e-9)
        assert cosine(a, -3 * a) == pytest.approx(-1)
    else:
        assert found == float(not any(x) and not any(y))


@given(PAIRS)
def test_sqnr_is_signal_over_noise_in_decibel(pair: tuple[Array, Array]) -> None:
    r, c = pair
    signal = math.fsum(x * x for x in r.ravel().tolist())
    noise = math.fsum((x - y) ** 2 for x, y in zip(r.ravel().tolist(), c.ravel().tolist()))  # noqa: B905
    found = sqnr_db(r, c)
    if noise and signal:
        assert found == pytest.approx(10 * math.log10(signal / noise), abs=1e-6)
    else:
        assert found == (math.inf if not noise else -math.inf)


def test_small_types_are_compared_in_float64() -> None:
    big = np.full(1000, 60000, np.float16)
    assert cosine(big, big) == pytest.approx(1)
    assert sqnr_db(big, (big / 2).astype(np.float16)) == pytest.approx(20 * math.log10(2))
    low, high = np.array([0, 200], np.uint8), np.array([1, 100], np.uint8)
    (found,) = differences({"y": low[None]}, {"y": high[None]})
    assert (found.max_absolute, found.max_relative) == (100, 0.5)


# --- what cannot be scored


def test_an_unknown_metric_is_named() -> None:
    with refused(UsageError, "'cosin'", hint="did you mean 'cosine'?"):
        scored("cosin", np.eye(2), [0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_outputs_that_are_no_numbers_are_not_scored(metric: str, bad: float) -> None:
    with refused(InputError, "'y'", "NaN or infinite", hint="the model is broken"):
        scored(metric, [[bad, 1.0]], [0], [[0.0, 1.0]])


@pytest.mark.parametrize("metric", sorted(set(METRICS) - metrics.NEED_TARGET))
def test_references_must_be_there_finite_and_of_the_same_shape(metric: str) -> None:
    output = {"y": np.zeros((2, 3))}
    with refused(InputError, f"'{metric}'", "reference model", hint="--reference"):
        score(metric, output, np.zeros(2), None)
    with refused(InputError, "'y'", "(2, 3)", "'z': (2, 3)", hint="same outputs"):
        score(metric, output, None, {"z": np.zeros((2, 3))})
    with refused(InputError, "'y': (2, 4)", hint="same outputs"):
        score(metric, output, None, {"y": np.zeros((2, 4))})
    with refused(InputError, "reference", "NaN", hint="broken"):
        score(metric, output, None, {"y": np.full((2, 3), np.nan)})


@pytest.mark.parametrize("metric", sorted(metrics.NEED_TARGET))
def test_labels_must_be_there(metric: str) -> None:
    with refused(InputError, f"'{metric}'", "no 'target'", hint="'agreement'"):
        scored(metric, np.eye(2), reference=np.eye(2))


def test_the_first_output_is_scored() -> None:
    outputs = {"logits": np.eye(2), "other": np.zeros((2, 9))}
    assert score("top1", outputs, np.array([0, 1]), None).score.value == 1


# --- intervals


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score interval).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share_has_wilsons_interval(hits: int, n: int, low: float, high: float) -> None:
    values = np.zeros(n)
    values[:hits] = 1
    found = mean_interval(values)
    assert found.value == pytest.approx(hits / n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_wilsons_bounds_solve_its_equation(counts: tuple[int, int]) -> None:
    n, hits = counts
    found = mean_interval(np.array([1.0] * hits + [0.0] * (n - hits)))
    z = 1.959963984540054
    for bound in (found.low, found.high):  # |p - bound| = z sqrt(bound (1 - bound) / n)
        gap = (hits / n - bound) ** 2
        assert gap == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_mean_has_students_interval() -> None:
    found = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    # t(0.975, 4) = 2.776445, s = sqrt(2.5)
    assert found.value == 3
    assert found.low == pytest.approx(3 - 2.776445 * math.sqrt(2.5 / 5), abs=1e-5)
    assert found.high == pytest.approx(3 + 2.776445 * math.sqrt(2.5 / 5), abs=1e-5)


@given(st.lists(VALUES, min_size=2, max_size=20))
def test_students_interval_is_scipys(values: list[float]) -> None:
    assume(not set(values) <= {0.0, 1.0} and len(set(values)) > 1)
    found = mean_interval(np.array(values))
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("values", [[0.5], [np.inf, np.inf], [np.inf, 1.0]])
def test_where_no_spread_can_be_told_nothing_is_promised(values: list[float]) -> None:
    found = mean_interval(np.array(values))
    assert (found.value, found.low, found.high) == (np.mean(values), -math.inf, math.inf)


def test_the_mean_of_both_infinities_is_no_number() -> None:
    found = mean_interval(np.array([np.inf, -np.inf]))
    assert math.isnan(found.value)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_model_compared_with_itself_has_no_noise() -> None:
    found = scored("sqnr", np.eye(3), reference=np.eye(3))
    assert found.score == Interval(value=math.inf, low=-math.inf, high=math.inf)


# --- drop


def paired(*values: float, low: float = 0, high: float = 1) -> Score:
    interval = Interval(value=float(np.mean(values)), low=low, high=high)
    return Score(metric="top1", score=interval, samples=len(values), per_sample=values)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=2, max_size=30))
def test_the_drop_is_paired_over_the_samples(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    lost = np.subtract(ours, theirs)
    found = drop(paired(*ours), paired(*theirs))
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    if len(set(lost)) > 1:
        want = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((want.low, want.high))
    elif not lost.any():
        assert (found.low, found.high) == (-3 / len(lost), 3 / len(lost))


def test_the_least_drop_is_the_one_sided_bound_of_a_paired_test() -> None:
    ours = RNG.random(50)
    theirs = ours - 0.1 + 0.05 * RNG.random(50)
    want = stats.ttest_rel(ours, theirs, alternative="greater").confidence_interval(0.999).low
    found = least_drop(paired(*ours), paired(*theirs), confidence=0.999)
    assert found == pytest.approx(want)
    assert 0 < found < drop(paired(*ours), paired(*theirs)).low
    alone = paired(*ours).model_copy(update={"per_sample": None})
    assert least_drop(alone, paired(*theirs), confidence=0.999) == float("-inf")


def test_a_paired_drop_is_narrower_than_that_of_two_means() -> None:
    ours = (RNG.random(1000) < 0.9).astype(float)
    theirs = ours.copy()
    theirs[:5] = 0
    one, other = (
        Score(metric="top1", score=mean_interval(v), samples=1000, per_sample=tuple(v.tolist()))
        for v in (ours, theirs)
    )
    tight = drop(one, other)
    wide = drop(one.model_copy(update={"per_sample": None}), other)
    assert tight.value == pytest.approx(wide.value)
    assert tight.high - tight.low < (wide.high - wide.low) / 2


def test_without_pairs_the_bounds_are_added_in_quadrature() -> None:
    one, other = paired(0.9, low=0.86, high=0.94), paired(0.8, low=0.77, high=0.83)
    bare = [score.model_copy(update={"per_sample": None}) for score in (one, other)]
    for a, b in ((bare[0], bare[1]), (one, bare[1]), (bare[0], other)):
        found = drop(a, b)
        assert found.value == pytest.approx(0.1)
        assert (found.low, found.high) == pytest.approx((0.05, 0.15))
    assert drop(bare[1], bare[0]).value == pytest.approx(-0.1)


def test_scores_of_other_samples_are_not_paired() -> None:
    found = drop(paired(1.0, 0.0, 1.0), paired(0.5))
    assert found.value == pytest.approx(2 / 3 - 0.5)


def test_one_sample_bounds_nothing() -> None:
    found = drop(paired(1.0), paired(0.0))
    assert (found.value, found.low, found.high) == (1, -math.inf, math.inf)


def test_infinite_scores_are_not_paired() -> None:
    found = drop(paired(math.inf, math.inf), paired(20.0, 30.0))
    assert found.value == math.inf


# --- differences


@given(PAIRS)
def test_differences_are_those_of_numpy(pair: tuple[Array, Array]) -> None:
    r, c = pair
    (found,) = differences({"y": r}, {"y": c})
    gap = np.abs(r - c).max()
    largest = np.abs(r).max()
    rows = zip(r.reshape(-1, r.shape[-1]), c.reshape(-1, r.shape[-1]), strict=True)
    same = [p.argmax() == q.argmax() for p, q in rows]
    assert found == Difference(
        output="y",
        max_absolute=gap,
        max_relative=gap / largest if largest else gap,
        cosine=cosine(r, c),
        sqnr_db=sqnr_db(r, c),
        agreement=np.mean(same) if r.ndim > 1 and r.shape[-1] > 1 else None,
    )


def test_equal_outputs_do_not_differ() -> None:
    outputs = {"a": RNG.normal(size=(3, 4)), "b": np.zeros((3, 1))}
    first, second = differences(outputs, {name: a.copy() for name, a in outputs.items()})
    assert first == Difference(output="a", max_absolute=0, max_relative=0, cosine=first.cosine,
                               sqnr_db=math.inf, agreement=1)  # fmt: skip
    assert first.cosine == pytest.approx(1)
    assert (second.output, second.cosine, second.agreement) == ("b", 1, None)


def test_outputs_of_other_names_or_shapes_are_not_compared() -> None:
    with refused(InputError, "['a']", "['b']", hint="same outputs"):
        differences({"a": np.zeros(1)}, {"b": np.zeros(1)})
    with refused(InputError, "'a'", "(2, 1)", "(1, 2)", hint="same outputs"):
        differences({"a": np.zeros((2, 1))}, {"a": np.zeros((1, 2))})
