"""The gate against an earlier run, on made times of known truth."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit import environment
from deploykit.errors import UsageError
from deploykit.measure import BenchOptions, BenchResult, gate
from deploykit.values import Interval, Measurement, Placement, Score, SessionOptions

LIMIT = 0.03


def timed(name: str, ms: float, rng: np.random.Generator, *, spread: float = 0.01) -> Measurement:
    """Eight processes, each a little off, of twelve blocks with twenty calls."""
    process = rng.normal(1, spread, (8, 1)).repeat(12, 0).reshape(-1, 1)
    times = process * rng.normal(1, 0.01, (96, 20)) * ms * 1e6
    return Measurement(
        name=name, backend="b", batch_size=1, options=SessionOptions(), load_ns=1, first_run_ns=1,
        warmup_runs=5, blocks_ns=tuple(map(tuple, times.astype(int).tolist())),
        process_blocks=(12,) * 8, yardsticks_ns=(1_000_000,) * 8,
        placement=Placement(provider="p", precisions={}), peak_rss_bytes=1,
    )  # fmt: skip


def run(seed: int, *, base: float = 2, fast: float = 1, spread: float = 0.01) -> BenchResult:
    rng = np.random.default_rng(seed)
    times = {"base": base, "fast": fast, "base (again)": base}
    return BenchResult(
        baseline="base", control="base (again)", options=BenchOptions(), inputs="real",
        measurements=tuple(timed(n, ms, rng, spread=spread) for n, ms in times.items()),
        data_digest="d", environment=environment.read(), load_average_after=0, steal_share=None,
    )  # fmt: skip


def test_the_same_is_no_regression_and_the_control_is_not_judged() -> None:
    found = gate.slowdowns(run(1), run(2), LIMIT)
    assert [s.name for s in found] == ["base", "fast"]
    assert not any(s.regressed for s in found)
    assert all(s.slowdown.low < 1 < s.slowdown.high or abs(s.slowdown.value - 1) < 0.02
               for s in found)  # fmt: skip


def test_a_regression_is_found_in_the_engine_that_has_it() -> None:
    base, fast = gate.slowdowns(run(1, fast=1.1), run(2), LIMIT)
    assert (base.regressed, fast.regressed) == (False, True)
    assert fast.slowdown.low < 1.1 < fast.slowdown.high
    assert fast.p_value < 0.05
    assert fast.limit == LIMIT


def test_faster_is_no_regression() -> None:
    assert not any(s.regressed for s in gate.slowdowns(run(1, fast=0.5), run(2), LIMIT))


def test_slower_by_less_than_the_limit_is_allowed() -> None:
    (_, fast) = gate.slowdowns(run(1, fast=1.1), run(2), 0.2)
    assert not fast.regressed


def test_a_difference_within_the_noise_of_either_run_is_none() -> None:
    noisy = run(2)
    control = noisy.measurements[2]
    slow = control.model_copy(
        update={"blocks_ns": tuple(tuple(int(t * 1.3) for t in b) for b in control.blocks_ns)}
    )
    noisy = noisy.model_copy(update={"measurements": (*noisy.measurements[:2], slow)})
    for pair in ((run(1, fast=1.1), noisy), (noisy, run(1, fast=1 / 1.1))):
        (_, fast) = gate.slowdowns(*pair, LIMIT)
        assert not fast.regressed
        assert fast.floor > 1.25


@pytest.mark.parametrize("now", [1_200_000, 800_000])
def test_a_machine_that_has_changed_raises_the_floor(now: int) -> None:
    changed = run(1, fast=1.1)
    slower = [m.model_copy(update={"yardsticks_ns": (now,) * 8}) for m in changed.measurements]
    changed = changed.model_copy(update={"measurements": tuple(slower)})
    (_, fast) = gate.slowdowns(changed, run(2), LIMIT)
    assert not fast.regressed
    assert fast.floor == pytest.approx(max(1.2, 1 / 0.8) if now < 1e6 else 1.2)


def test_false_alarms_are_rare_and_a_planted_regression_is_found() -> None:
    """Of 20 runs whose processes differ by 1 %."""
    alarms = sum(
        any(s.regressed for s in gate.slowdowns(run(i), run(1000 + i), 0.0)) for i in range(20)
    )
    found = sum(
        gate.slowdowns(run(i, fast=1.05), run(1000 + i), LIMIT)[1].regressed for i in range(20)
    )
    assert alarms <= 2
    assert found >= 18


def test_runs_without_a_common_engine_are_no_comparison() -> None:
    other = run(2)
    renamed = [m.model_copy(update={"name": f"old {m.name}"}) for m in other.measurements]
    other = other.model_copy(
        update={"measurements": tuple(renamed), "baseline": "old base", "control": "old base"}
    )
    with pytest.raises(UsageError, match="no engine was measured in both runs"):
        gate.slowdowns(run(1), other, LIMIT)


def test_what_the_earlier_run_cannot_judge_is_known_before_the_work() -> None:
    then = run(1)
    name = then.baseline
    assert gate.unknown(then, [name], [1]) == []
    assert gate.unknown(then, [name, "new"], [1]) == ["new (batch 1)"]
    assert gate.unknown(then, [name], [1, 8]) == [f"{name} (batch 8)"]
    with pytest.raises(UsageError, match="no engine was measured in both runs"):
        gate.unknown(then, ["new"], [1])
    broken = [
        m.model_copy(update={"invalid": "gone"}) if m.name == then.control else m
        for m in then.measurements
    ]
    with pytest.raises(UsageError, match="no noise floor at batch 1"):
        gate.unknown(then.model_copy(update={"measurements": tuple(broken)}), [name], [1])


def test_what_makes_two_runs_no_comparison_is_named() -> None:
    here, then = environment.read(), run(1)
    options = then.options
    assert gate.differences(then, here, options, "d") == []
    assert gate.differences(then, here, options, "e") == ["the data is not the same"]
    other = here.model_copy(update={"cpu": "Z80", "libraries": {}, "system": "another kernel"})
    assert gate.differences(then, other, options, "d") == [f"cpu: {here.cpu} then, Z80 now"]
    changed = BenchOptions(threads=2, preset="quick")
    assert gate.differences(then, here, changed, "d") == [
        "threads: 1 then, 2 now",
        "the preset was quick now",
    ]


def scored(result: BenchResult, **scores: float) -> BenchResult:
    made = {
        name: Score(
            metric="top1",
            score=Interval(value=value, low=value - 0.002, high=value + 0.002),
            samples=1000,
        )
        for name, value in scores.items()
    }
    return result.model_copy(update={"scores": made})


def test_a_score_is_held_against_the_earlier_run_else_against_the_baseline() -> None:
    now, then = scored(run(1), base=0.9, fast=0.85), scored(run(2), base=0.9, fast=0.851)
    assert [(d.name, d.reference, d.regressed) for d in gate.drops(now, then, 0.01)] == [
        ("base", "base, earlier", False),
        ("fast", "fast, earlier", False),
    ]
    (alone,) = gate.drops(now, None, 0.01)
    assert (alone.name, alone.reference, alone.regressed) == ("fast", "base", True)
    assert alone.drop.value == pytest.approx(0.05)
