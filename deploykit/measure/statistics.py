"""What raw times say, with intervals. Blocks are the unit: single calls are autocorrelated.

Every function raises InputError for a measurement that is invalid or has too few blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import ceil, exp, log
from typing import Literal

import numpy as np

from deploykit.errors import InputError
from deploykit.measure.result import MIN_BLOCKS, BenchResult
from deploykit.values import Array, Interval, Measurement, Value

SEED = 0
"""Of the bootstrap: the same times give the same interval."""
RESAMPLES, QUANTILE_RESAMPLES = 9999, 999
DRIFT_WINDOWS = 18

Claim = Literal["faster", "slower", "no difference"]
Statistic = Callable[[Array], Array]
"""Block indices, integers [..., blocks], to one number for each resample, float64 [...]."""


class Comparison(Value):
    """A candidate's speed beside the baseline's, and what may be claimed of it."""

    name: str
    batch_size: int
    speedup: Interval
    noise: Interval
    """The baseline's speed beside itself, in the same run."""
    claim: Claim


def speedup(baseline: Measurement, candidate: Measurement) -> Interval:
    """How many times as fast the candidate is; above 1 it is faster. Both are of one run.

    exp of the mean of the paired log ratios of block medians, that is their geometric mean (Fleming
    and Wallace 1986: the mean to use for ratios); BCa bootstrap over blocks (Efron and Tibshirani
    1993, section 14.3).
    """
    pair = _medians_ns(baseline), _medians_ns(candidate)
    if len(pair[0]) != len(pair[1]) or baseline.batch_size != candidate.batch_size:
        raise InputError(
            f"{baseline.name} and {candidate.name} were not measured side by side",
            hint="compare measurements of one run and one batch size",
        )
    ratios = np.log(pair[0] / pair[1])
    found = _bootstrap(len(ratios), lambda picks: ratios[picks].mean(-1))
    return Interval(value=exp(found.value), low=exp(found.low), high=exp(found.high))


def throughput(measurement: Measurement) -> Interval:
    """Samples a second of one caller: samples over the time that their calls took.

    A ratio estimator with a BCa bootstrap over blocks (Efron and Tibshirani 1993, section 14.3).
    """
    blocks = _blocks(measurement)
    samples = np.array([len(block) for block in blocks]) * measurement.batch_size
    seconds = np.array([block.sum() for block in blocks]) / 1e9
    return _bootstrap(len(blocks), lambda p: samples[p].sum(-1) / seconds[p].sum(-1))


def percentile_ms(measurement: Measurement, percent: float) -> float | None:
    """The call time that `percent` of the calls do not exceed; None if they are too few to tell.

    Nearest rank: a time that was really observed. See `minimum_samples`.
    """
    calls = np.concatenate(_blocks(measurement))
    return _nearest_rank_ms(calls, percent) if len(calls) >= minimum_samples(percent) else None


def percentile_interval_ms(measurement: Measurement, percent: float) -> Interval | None:
    """`percentile_ms` with its interval; None if the calls are too few to tell.

    Percentile bootstrap over whole blocks (Carlstein 1986: they keep what calls owe each other).
    """
    value = percentile_ms(measurement, percent)
    if value is None:
        return None
    blocks = _blocks(measurement)
    picks = np.random.default_rng(SEED).integers(
        len(blocks), size=(QUANTILE_RESAMPLES, len(blocks))
    )
    found = [_nearest_rank_ms(np.concatenate([blocks[i] for i in pick]), percent) for pick in picks]
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def minimum_samples(percent: float) -> int:
    """The fewest calls that tell this percentile: p90 64, p99 459, p99.9 4603.

    MLPerf LoadGen's early stopping at confidence 0.99 and tolerance 0: the smallest n with
    1 - (percent / 100)^n >= 0.99. For p90 it asks for 64.
    """
    if percent == 90:
        return 64
    return ceil(log(1 - 0.99) / log(percent / 100))


def noise_floor(result: BenchResult, batch_size: int) -> Interval:
    """The baseline's speed beside itself in another process: what this run takes 1 for."""
    return speedup(result.of(result.baseline, batch_size), result.of(result.control, batch_size))


def faster(speedup: Interval, noise: Interval) -> bool:
    """Whether a gain may be claimed: its interval excludes 1, and it is more than noise.

    More than noise is above the ratio that the interval of the A/A control still allows, in either
    direction.
    """
    return speedup.low > 1 and speedup.value > max(noise.high, 1 / noise.low)


def compare_speed(result: BenchResult, name: str, batch_size: int) -> Comparison:
    """A candidate beside the baseline of the same run, and the claim that this allows."""
    found = speedup(result.of(result.baseline, batch_size), result.of(name, batch_size))
    noise = noise_floor(result, batch_size)
    inverse = Interval(value=1 / found.value, low=1 / found.high, high=1 / found.low)
    claim: Claim = "no difference"
    if faster(found, noise):
        claim = "faster"
    elif faster(inverse, noise):
        claim = "slower"
    return Comparison(name=name, batch_size=batch_size, speedup=found, noise=noise, claim=claim)


def drift(medians: Sequence[int]) -> tuple[float, float] | None:
    """First and last level of window medians that still move one way at the end, or None.

    The thirds of the later half must step in one direction, 5 % each and 20 % together, and their
    middle halves must not overlap: noise has no direction, and the one step of a busy neighbour is
    no drift. Fewer than DRIFT_WINDOWS in that half tell nothing.
    """
    late = np.log(medians[len(medians) // 2 :])
    if len(late) < DRIFT_WINDOWS:
        return None
    low, level, high = np.transpose(
        [np.quantile(third, (0.25, 0.5, 0.75)) for third in np.array_split(late, 3)]
    )
    steps = np.diff(level)
    up = (steps > log(1.05)).all() and (low[1:] > high[:-1]).all()
    down = (steps < -log(1.05)).all() and (high[1:] < low[:-1]).all()
    return (exp(level[0]), exp(level[2])) if (up or down) and abs(steps.sum()) > log(1.2) else None


def _blocks(measurement: Measurement) -> list[Array]:
    """The blocks of a measurement that may be used, int64 nanoseconds."""
    if measurement.invalid:
        raise InputError(
            f"{measurement.name} has no valid times: {measurement.invalid}",
            hint="remove the cause, then measure again",
        )
    if len(measurement.blocks_ns) < MIN_BLOCKS:
        raise InputError(
            f"{measurement.name}: {len(measurement.blocks_ns)} blocks carry no interval",
            hint=f"measure at least {MIN_BLOCKS}",
        )
    return [np.array(block, dtype=np.int64) for block in measurement.blocks_ns]


def _medians_ns(measurement: Measurement) -> Array:
    return np.array([np.median(block) for block in _blocks(measurement)])


def _nearest_rank_ms(calls_ns: Array, percent: float) -> float:
    return float(np.percentile(calls_ns, percent, method="inverted_cdf")) / 1e6


def _bootstrap(blocks: int, statistic: Statistic) -> Interval:
    """A statistic of all blocks with its 95 % interval."""
    from scipy import stats

    def of_resample(picks: Array, axis: int) -> Array:
        del axis  # always the last
        return statistic(picks.astype(np.intp))

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # BCa divides by zero where all blocks are alike
        found = stats.bootstrap(
            (np.arange(blocks),),
            of_resample,
            n_resamples=RESAMPLES,
            vectorized=True,
            random_state=np.random.default_rng(SEED),
        )
    value = float(statistic(np.arange(blocks)))
    low, high = found.confidence_interval
    if not (np.isfinite(low) and np.isfinite(high)):
        low, high = np.quantile(found.bootstrap_distribution, (0.025, 0.975))
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))
