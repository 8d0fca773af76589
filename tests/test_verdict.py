from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.metrics import drop
from deploykit.values import Gate, Interval, Score, Verdict
from deploykit.verdict import Contender, Limits, decide

LIMITS = Limits(max_drop=0.01, min_speedup=1.05)


def scored(value: float) -> Score:
    return Score(
        metric="top1",
        samples=1000,
        score=Interval(value=value, low=value - 0.01, high=value + 0.01),
    )


def contender(name: str, score: float = 0.9, gain: float | None = 2.0) -> Contender:
    speedup = None if gain is None else Interval(value=gain, low=gain - 0.1, high=gain + 0.1)
    return Contender(name, scored(score), speedup)


def decided(*contenders: Contender, limits: Limits = LIMITS) -> Verdict:
    return decide(scored(0.9), contenders, limits)


def gate(verdict: Verdict, engine: str, name: str) -> Gate:
    (found,) = [g for g in verdict.gates if (g.engine, g.name) == (engine, name)]
    return found


# --- the gates


def test_each_engine_meets_both_gates_with_number_limit_and_interval() -> None:
    verdict = decided(contender("a", 0.895, 1.5), contender("b", 0.7, 1.0))
    assert [(g.engine, g.name) for g in verdict.gates] == [
        ("a", "max_drop"), ("a", "min_speedup"), ("b", "max_drop"), ("b", "min_speedup"),
    ]  # fmt: skip
    lost, gain = verdict.gates[:2]
    assert lost.value == drop(scored(0.9), scored(0.895))
    assert (lost.limit, gain.limit) == (0.01, 1.05)
    assert (gain.value.value, gain.value.low) == (1.5, 1.4)
    assert [g.passed for g in verdict.gates] == [True, True, False, False]


@pytest.mark.parametrize(("score", "passed"), [(0.5, True), (0.375, True), (0.25, False)])
def test_the_drop_may_be_as_large_as_its_limit(score: float, passed: bool) -> None:
    limits = Limits(max_drop=0.125, min_speedup=1)
    verdict = decide(scored(0.5), (contender("a", score),), limits)
    assert gate(verdict, "a", "max_drop").passed is passed


@pytest.mark.parametrize(("gain", "passed"), [(1.2, True), (1.1, False), (1.0, False)])
def test_the_lower_bound_of_the_speed_up_must_be_above_its_limit(gain: float, passed: bool) -> None:
    interval = Interval(value=gain + 5, low=gain, high=gain + 9)
    verdict = decided(Contender("a", scored(0.9), interval), limits=Limits(0, 1.1))
    assert gate(verdict, "a", "min_speedup").passed is passed


def test_a_speed_up_that_could_not_be_measured_does_not_pass() -> None:
    verdict = decided(contender("a", gain=None), limits=Limits(0, 0))
    assert not gate(verdict, "a", "min_speedup").passed
    assert verdict.ship is None


def test_a_score_that_is_no_number_does_not_pass() -> None:
    broken = Score(metric="m", samples=1, score=Interval(value=math.nan, low=0, high=0))
    verdict = decided(Contender("a", broken, Interval(value=9, low=9, high=9)))
    assert not gate(verdict, "a", "max_drop").passed
    assert verdict.ship is None


def test_a_better_score_is_no_loss() -> None:
    assert decided(contender("a", 0.95), limits=Limits(0, 1)).ship == "a"


# --- the answer


def test_the_fastest_that_passes_both_is_shipped() -> None:
    verdict = decided(
        contender("slow", 0.9, 1.5), contender("fast", 0.895, 3.0), contender("faster", 0.8, 9.0)
    )
    assert verdict.ship == "fast"
    assert verdict.reason == "fast passes both gates and is the fastest that does"


@given(st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0.2, 9)), max_size=6))
def test_what_ships_has_passed_and_nothing_that_passed_is_faster(
    found: list[tuple[float, float | None]],
) -> None:
    contenders = [contender(str(i), score, gain) for i, (score, gain) in enumerate(found)]
    verdict = decided(*contenders)
    assert len(verdict.gates) == 2 * len(contenders)
    speeds = {
        c.name: gate(verdict, c.name, "min_speedup").value.value
        for c in contenders
        if all(g.passed for g in verdict.gates if g.engine == c.name)
    }
    assert (verdict.ship is None) == (not speeds)
    assert verdict.ship is None or speeds[verdict.ship] == max(speeds.values())


def test_without_an_engine_the_answer_is_no() -> None:
    verdict = decided()
    assert (verdict.ship, verdict.gates) == (None, ())
    assert verdict.reason == "there is no engine to compare with the float model"


# --- the nearest miss


def test_the_reason_of_a_no_names_the_numbers_and_the_limits() -> None:
    verdict = decided(contender("int8", 0.85, 2.0))
    assert verdict.ship is None
    assert verdict.reason == (
        "the nearest is int8: it loses 0.0500 (allowed 0.0100) and is 2.00x as fast as FP32 ONNX "
        "[1.90, 2.10] (needed above 1.05)"
    )


@pytest.mark.parametrize(
    ("others", "nearest"),
    [
        ([contender("lossy", 0.5, 9.0), contender("slow", 0.9, 1.0)], "slow"),
        ([contender("lossy", 0.5, 9.0), contender("close", 0.88, 2.0)], "close"),
        ([contender("slower", 0.9, 0.5), contender("slow", 0.895, 1.0)], "slow"),
        ([contender("close", 0.88, 1.0), contender("as close", 0.88, 2.0)], "as close"),
        ([contender("unknown", 0.9, None), contender("slow", 0.9, 1.0)], "slow"),
    ],
)
def test_the_nearest_loses_least_then_is_the_fastest(others: list[Contender], nearest: str) -> None:
    for order in (others, others[::-1]):
        assert decided(*order).reason.startswith(f"the nearest is {nearest}: ")


def test_a_speed_that_was_not_measured_is_not_told_as_a_number() -> None:
    reason = decided(contender("a", gain=None)).reason
    assert reason.endswith("(allowed 0.0100) and its speed could not be measured")
