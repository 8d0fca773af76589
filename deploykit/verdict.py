"""Fit to ship or not: two gates, each with its number, its limit and its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from deploykit import metrics
from deploykit.values import Gate, Interval, Score, Verdict


class Contender(NamedTuple):
    """An engine that might be shipped; `speedup` is None where it could not be measured."""

    name: str
    score: Score
    speedup: Interval | None


class Limits(NamedTuple):
    """What the gates ask for."""

    max_drop: float
    min_speedup: float
    """The lower bound of the speed-up must be above this, and above the noise floor."""


def decide(reference: Score, contenders: tuple[Contender, ...], limits: Limits) -> Verdict:
    """The fastest contender that passes both gates against the float ONNX model."""
    tried = {c.name: _gates(reference, c, limits) for c in contenders}
    gates = tuple(gate for pair in tried.values() for gate in pair)
    passed = {name: pair for name, pair in tried.items() if all(g.passed for g in pair)}
    if not passed:
        return Verdict(ship=None, gates=gates, reason=_nearest_miss(tried))
    best = max(passed, key=lambda name: passed[name][1].value.value)
    reason = f"{best} passes both gates and is the fastest that does"
    return Verdict(ship=best, gates=gates, reason=reason)


def _gates(reference: Score, contender: Contender, limits: Limits) -> tuple[Gate, Gate]:
    lost = metrics.drop(reference, contender.score)
    gain = contender.speedup or Interval(value=0, low=0, high=0)
    return (
        Gate(
            name="max_drop",
            engine=contender.name,
            value=lost,
            limit=limits.max_drop,
            passed=lost.value <= limits.max_drop,
        ),
        Gate(
            name="min_speedup",
            engine=contender.name,
            value=gain,
            limit=limits.min_speedup,
            passed=gain.low > limits.min_speedup,
        ),
    )


def _nearest_miss(tried: Mapping[str, tuple[Gate, Gate]]) -> str:
    """The contender that loses least above its limit, then the fastest, in one sentence."""
    if not tried:
        return "there is no engine to compare with the float model"
    drop, gain = max(
        tried.values(),
        key=lambda pair: (
            pair[0].passed,
            0 if pair[0].passed else -pair[0].value.value,
            pair[1].passed,
            pair[1].value.value,
        ),
    )
    speed = (
        f"is {gain.value.value:.2f}x as fast as FP32 ONNX "
        f"[{gain.value.low:.2f}, {gain.value.high:.2f}] (needed above {gain.limit:.2f})"
        if gain.value.value
        else "its speed could not be measured"
    )
    return (
        f"the nearest is {drop.engine}: it loses {drop.value.value:.4f} "
        f"(allowed {drop.limit:.4f}) and {speed}"
    )
