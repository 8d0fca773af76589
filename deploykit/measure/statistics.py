"""What raw times say, with intervals.

The unit is the process: single calls are autocorrelated, and so are blocks, since a process keeps
the memory layout that it once got. Where all blocks are of one process, the block is the unit, and
the interval misses what another process would have given.
Every function raises InputError for a measurement that is invalid or has too few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp, log, sqrt
from typing import Literal, NamedTuple

import numpy as np

from deploykit.errors import InputError
from deploykit.measure.result import MIN_BLOCKS, BenchResult, Instances
from deploykit.values import Array, Interval, Measurement, Value

SEED = 0
"""Of the bootstrap: the same times give the same interval."""
RESAMPLES, QUANTILE_RESAMPLES = 9999, 999
SIGNIFICANT = 0.05
"""Largest p-value of a claim, over all comparisons of a run together."""

Claim = Literal["faster", "slower", "no difference"]
Statistic = Callable[[Array], Array]
"""Indices of units, integers [..., units], to one number for each resample, float64 [...]."""


class Estimate(NamedTuple):
    """A number from some units, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    freedom: int

    def bounds(self) -> tuple[float, float]:
        """The 95 % interval by Student's t, which is right for few units too."""
        from scipy import stats

        half = float(stats.t.ppf(0.975, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p_value(self, null: float = 0.0) -> float:
        """Of the two-sided t-test that the truth is `null`."""
        from scipy import stats

        gap = abs(self.value - null)
        if self.error == 0:
            return 1.0 if gap == 0 else 0.0
        return float(2 * stats.t.sf(gap / self.error, self.freedom))


class Comparison(Value):
    """A candidate's speed beside the baseline's, and what may be claimed of it."""

    name: str
    batch_size: int
    speedup: Interval
    noise: Interval
    """The baseline's speed beside itself, in the same run."""
    p_value: float
    """That there is no difference; corrected for all comparisons of the run (Holm 1979)."""
    claim: Claim


def speedup(baseline: Measurement, candidate: Measurement) -> Interval:
    """How many times as fast the candidate is; above 1 it is faster. Both are of one run."""
    found = log_speedup(baseline, candidate)
    low, high = found.bounds()
    return Interval(value=exp(found.value), low=exp(low), high=exp(high))


def log_speedup(baseline: Measurement, candidate: Measurement) -> Estimate:
    """The mean of the paired log ratios of block medians, with an error over processes.

    Its exp is the geometric mean of the ratios (Fleming and Wallace 1986: the mean to use for
    ratios). Whole processes are resampled, as Davison and Hinkley 1997, section 3.8, advise for
    data in groups.
    """
    pair = _medians_ns(baseline), _medians_ns(candidate)
    units = _units(baseline)
    if len(pair[0]) != len(pair[1]) or baseline.batch_size != candidate.batch_size:
        raise InputError(
            f"{baseline.name} and {candidate.name} were not measured side by side",
            hint="compare measurements of one run and one batch size",
        )
    ratios = np.log(pair[0] / pair[1])
    means = np.array([ratios[unit].mean() for unit in units])
    return _estimate(len(means), lambda picks: means[picks].mean(-1))


def log_median_ns(measurement: Measurement) -> Estimate:
    """The mean log of block medians, with an error over processes: to compare runs."""
    medians = np.log(_medians_ns(measurement))
    means = np.array([medians[unit].mean() for unit in _units(measurement)])
    return _estimate(len(means), lambda picks: means[picks].mean(-1))


def throughput(measurement: Measurement) -> Interval:
    """Samples a second of one caller: samples over the time that their calls took.

    A ratio estimator, its error by bootstrap over processes.
    """
    blocks, units = _blocks(measurement), _units(measurement)
    samples = np.array([sum(len(blocks[i]) for i in unit) for unit in units])
    seconds = np.array([sum(blocks[i].sum() for i in unit) for unit in units]) / 1e9
    size = measurement.batch_size
    found = _estimate(len(units), lambda p: np.log(size * samples[p].sum(-1) / seconds[p].sum(-1)))
    low, high = found.bounds()
    return Interval(value=exp(found.value), low=exp(low), high=exp(high))


def energy_mj(measurement: Measurement) -> dict[str, Interval]:
    """Millijoules a sample by each meter: what the machine took over the samples of the blocks.

    A ratio estimator as `throughput`, its error by bootstrap over processes.
    """
    units = _units(measurement)
    sizes = [len(block) * measurement.batch_size for block in _blocks(measurement)]
    samples = np.array([sum(sizes[i] for i in unit) for unit in units])
    told = {}
    for meter, blocks in measurement.energy_uj.items():
        spent = np.array([sum(blocks[i] for i in unit) for unit in units]) / 1e3
        found = _of_sums(spent, samples)
        low, high = found.bounds()
        told[meter] = Interval(value=found.value, low=max(0.0, low), high=high)
    return told


def _of_sums(above: Array, below: Array) -> Estimate:
    return _estimate(len(above), lambda p: above[p].sum(-1) / below[p].sum(-1))


def throughput_together(instances: Instances) -> Interval:
    """Samples a second of all instances: the sum of each one's over the blocks that ran at once.

    Its error is by bootstrap over blocks.
    """
    if instances.invalid:
        raise InputError(
            f"{len(instances.blocks_ns)} instances of {instances.name}: {instances.invalid}",
            hint="remove the cause, then measure again",
        )
    rates = np.array(
        [[len(block) / (sum(block) / 1e9) for block in blocks] for blocks in instances.blocks_ns]
    )
    sums = np.log(rates.sum(0) * instances.batch_size)
    found = _estimate(len(sums), lambda picks: sums[picks].mean(-1))
    low, high = found.bounds()
    return Interval(value=exp(found.value), low=exp(low), high=exp(high))


def percentile_ms(measurement: Measurement, percent: float) -> float | None:
    """The call time that `percent` of the calls do not exceed; None if they are too few to tell.

    Nearest rank: a time that was really observed. See `minimum_samples`.
    """
    calls = np.concatenate(_blocks(measurement))
    return _nearest_rank_ms(calls, percent) if len(calls) >= minimum_samples(percent) else None


def percentile_interval_ms(measurement: Measurement, percent: float) -> Interval | None:
    """`percentile_ms` with its interval; None if the calls are too few to tell."""
    return percentile_intervals_ms(measurement, (percent,))[0]


def percentile_intervals_ms(
    measurement: Measurement, percents: Sequence[float]
) -> tuple[Interval | None, ...]:
    """Several percentiles with their intervals.

    Percentile bootstrap over processes, and over the blocks of each (Carlstein 1986: whole blocks
    keep what calls owe each other).
    """
    bounds = np.quantile(_resampled_ms(measurement, percents), (0.025, 0.975), axis=0).T
    return tuple(
        value
        if (value := percentile_ms(measurement, percent)) is None
        else Interval(value=value, low=min(float(low), value), high=max(float(high), value))
        for percent, (low, high) in zip(percents, bounds, strict=True)
    )


def _resampled_ms(measurement: Measurement, percents: Sequence[float]) -> Array:
    """The percentiles of each resample, float64 [resamples, percents]."""
    blocks, groups = _blocks(measurement), _processes(measurement)
    calls, block_of = np.concatenate(blocks), np.repeat(range(len(blocks)), [*map(len, blocks)])
    order = np.argsort(calls)
    calls, block_of = calls[order], block_of[order]
    shares, rng = np.array(percents) / 100, np.random.default_rng(SEED)
    found = np.empty((QUANTILE_RESAMPLES, len(percents)))
    for row in found:
        chosen = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        picks = np.concatenate([g[rng.integers(len(g), size=len(g))] for g in chosen])
        copies = np.bincount(picks, minlength=len(blocks))[block_of].cumsum()
        row[:] = calls[np.searchsorted(copies, np.ceil(shares * copies[-1] - 1e-9))] / 1e6
    return found


def percentile_bound_ms(measurement: Measurement, percent: float) -> float:
    """What the percentile is not below, 95 % sure, however few the calls are.

    An order statistic: the k-th smallest call, where a binomial of the calls below the percentile
    reaches k with probability 0.95 (Conover 1999, section 3.2).
    """
    from scipy import stats

    calls = np.sort(np.concatenate(_blocks(measurement)))
    rank = int(stats.binom.ppf(0.05, len(calls), percent / 100))
    return float(calls[max(rank, 1) - 1]) / 1e6


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
    found = compare_all(result, batch_size)
    if name not in found:
        estimate = log_speedup(result.of(result.baseline, batch_size), result.of(name, batch_size))
        return _comparison(result, name, batch_size, estimate.p_value())
    return found[name]


def compare_all(result: BenchResult, batch_size: int) -> dict[str, Comparison]:
    """Every valid candidate beside the baseline, with p-values corrected by Holm 1979.

    Empty where the baseline or its control is invalid.
    """
    valid = {m.name: m for m in result.measurements if m.batch_size == batch_size and not m.invalid}
    if not {result.baseline, result.control} <= set(valid):
        return {}
    base = valid[result.baseline]
    others = [m for name, m in valid.items() if name not in (result.baseline, result.control)]
    corrected = holm([log_speedup(base, m).p_value() for m in others])
    return {
        m.name: _comparison(result, m.name, batch_size, p)
        for m, p in zip(others, corrected, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[index]))
        corrected[index] = largest
    return corrected


def _comparison(result: BenchResult, name: str, batch_size: int, p_value: float) -> Comparison:
    found = speedup(result.of(result.baseline, batch_size), result.of(name, batch_size))
    noise = noise_floor(result, batch_size)
    inverse = Interval(value=1 / found.value, low=1 / found.high, high=1 / found.low)
    claim: Claim = "no difference"
    if p_value < SIGNIFICANT and faster(found, noise):
        claim = "faster"
    elif p_value < SIGNIFICANT and faster(inverse, noise):
        claim = "slower"
    return Comparison(
        name=name, batch_size=batch_size, speedup=found, noise=noise, p_value=p_value, claim=claim
    )


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


def _processes(measurement: Measurement) -> list[Array]:
    """Block indices of each process."""
    ends = np.cumsum(measurement.process_blocks or (len(measurement.blocks_ns),))
    return [group for group in np.split(np.arange(ends[-1]), ends[:-1]) if len(group)]


def _units(measurement: Measurement) -> list[Array]:
    """Block indices of each unit: a process, or a single block where there is but one process."""
    groups = _processes(measurement)
    return groups if len(groups) > 1 else [np.array([i]) for i in groups[0]]


def _nearest_rank_ms(calls_ns: Array, percent: float) -> float:
    return float(np.percentile(calls_ns, percent, method="inverted_cdf")) / 1e6


def _estimate(units: int, statistic: Statistic) -> Estimate:
    """A statistic of all units; its standard error by bootstrap over them.

    A bootstrap of n units is too narrow by sqrt((n - 1) / n), which is corrected (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap", section 3.2).
    """
    from scipy import stats

    def of_resample(picks: Array, axis: int) -> Array:
        del axis  # always the last
        return statistic(picks.astype(np.intp))

    found = stats.bootstrap(
        (np.arange(units),),
        of_resample,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    )
    value = float(statistic(np.arange(units)))
    error = float(found.standard_error) * sqrt(units / (units - 1))
    return Estimate(value, error if error > 1e-12 else 0.0, units - 1)
