"""A gate against an earlier run: a no only for what is significant, and more than noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, hypot, log
from statistics import median

from deploykit import metrics
from deploykit.environment import Environment
from deploykit.errors import UsageError
from deploykit.measure import statistics
from deploykit.measure.result import BenchOptions, BenchResult, Drop, Slowdown
from deploykit.values import Interval, Measurement


def differences(
    then: BenchResult, environment: Environment, options: BenchOptions, data_digest: str | None
) -> list[str]:
    """What about machine, settings and data makes times no comparison with the earlier run's.

    Versions of libraries may differ: they are what such a gate is there for.
    """
    mine, theirs = environment.hardware(), then.environment.hardware()
    found = [
        f"{key}: {theirs[key]} then, {mine[key]} now" for key in mine if mine[key] != theirs[key]
    ]
    if options.threads != then.options.threads:
        found.append(f"threads: {then.options.threads} then, {options.threads} now")
    if data_digest != then.data_digest:
        found.append("the data is not the same")
    quick = [when for when, o in (("then", then.options), ("now", options)) if o.preset == "quick"]
    return found + [f"the preset was quick {when}" for when in quick]


def unknown(then: BenchResult, names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """What the earlier run has no valid times of, to know before a minute of work.

    Raises UsageError: of nothing, or there is no noise floor at a batch size to compare at.
    """
    valid = {(m.name, m.batch_size) for m in then.measurements if not m.invalid}
    asked = [(name, size) for size in dict.fromkeys(sizes) for name in names]
    common = [each for each in asked if each in valid]
    if not common:
        raise _nothing_common([name for name, _ in valid if name != then.control])
    for _, size in common:
        if not {(then.baseline, size), (then.control, size)} <= valid:
            raise UsageError(
                f"the earlier run has no noise floor at batch {size}: its baseline or the control "
                "is invalid",
                hint="measure it again",
            )
    return [f"{name} (batch {size})" for name, size in asked if (name, size) not in valid]


def _nothing_common(names: Iterable[str]) -> UsageError:
    told = ", ".join(dict.fromkeys(names)) or "none"
    return UsageError("no engine was measured in both runs", hint=f"the earlier run has: {told}")


def slowdowns(now: BenchResult, then: BenchResult, limit: float) -> tuple[Slowdown, ...]:
    """Each engine that both runs measured, beside itself.

    A regression is slower by more than `limit` (0.03 for 3 %), with a corrected p-value below
    statistics.SIGNIFICANT, and slower by more than either run's noise floor and by more than the
    machine itself, as its yardstick tells. Raises UsageError: no engine is in both. InputError: the
    control of a run is invalid.
    """
    before = {(m.name, m.batch_size): m for m in then.measurements if not m.invalid}
    pairs = [
        (m, before[m.name, m.batch_size])
        for m in now.measurements
        if not m.invalid and m.name != now.control and (m.name, m.batch_size) in before
    ]
    if not pairs:
        raise _nothing_common(name for name, _ in before)
    machine = _machine(now, then)
    estimates = [_log_ratio(*pair) for pair in pairs]
    corrected = statistics.holm([estimate.p_value() for estimate in estimates])
    return tuple(
        _judged(m, estimate, p, floor=max(_floor(now, m), _floor(then, m), machine), limit=limit)
        for (m, _), estimate, p in zip(pairs, estimates, corrected, strict=True)
    )


def drops(now: BenchResult, then: BenchResult | None, limit: float) -> tuple[Drop, ...]:
    """How much lower each engine scores than itself in the earlier run, or than the baseline.

    Against the baseline of this run where no earlier run has a score of the metric.
    """
    found = []
    for name, score in now.scores.items():
        earlier = then.scores.get(name) if then else None
        same = earlier if earlier and earlier.metric == score.metric else None
        reference = same or now.scores.get(now.baseline)
        if reference is None or reference is score:
            continue
        lost = metrics.drop(reference, score)
        found.append(
            Drop(
                name=name,
                reference=f"{name}, earlier" if same else now.baseline,
                metric=score.metric,
                drop=lost,
                limit=limit,
                regressed=lost.value > limit and lost.low > 0,
            )
        )
    return tuple(found)


def _log_ratio(now: Measurement, then: Measurement) -> statistics.Estimate:
    """Log of the time now over the time then; degrees of freedom by Welch 1947."""
    a, b = statistics.log_median_ns(now), statistics.log_median_ns(then)
    error = hypot(a.error, b.error)
    parts = a.error**4 / a.freedom + b.error**4 / b.freedom
    freedom = int(error**4 / parts) if parts else min(a.freedom, b.freedom)
    return statistics.Estimate(a.value - b.value, error, max(1, freedom))


def _floor(result: BenchResult, measurement: Measurement) -> float:
    noise = statistics.noise_floor(result, measurement.batch_size)
    return max(noise.high, 1 / noise.low)


def _machine(now: BenchResult, then: BenchResult) -> float:
    """How much the machine itself changed, as a ratio above 1; 1 where a run has no yardstick."""
    both = [[t for m in run.measurements for t in m.yardsticks_ns] for run in (now, then)]
    if not all(both):
        return 1.0
    return exp(abs(log(median(both[0]) / median(both[1]))))


def _judged(
    now: Measurement, estimate: statistics.Estimate, p_value: float, *, floor: float, limit: float
) -> Slowdown:
    low, high = (exp(bound) for bound in estimate.bounds())
    ratio = exp(estimate.value)
    beyond = ratio > 1 + limit and ratio > floor and p_value < statistics.SIGNIFICANT
    return Slowdown(
        name=now.name,
        batch_size=now.batch_size,
        slowdown=Interval(value=ratio, low=low, high=high),
        floor=floor,
        p_value=p_value,
        limit=limit,
        regressed=beyond,
    )
