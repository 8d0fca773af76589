from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import InputError
from deploykit.measure import (
    faster,
    percentile_interval_ms,
    percentile_ms,
    speedup,
    throughput,
)
from deploykit.measure.drift import drift, trend
from deploykit.measure.statistics import energy_mj, holm, minimum_samples, percentile_bound_ms
from deploykit.values import Interval, Measurement, Placement, SessionOptions


def noisy(rng: np.random.Generator, level_ns: float, blocks: int = 20, calls: int = 30):
    """Blocks whose level wanders by 3 %, and calls with a tail to the right."""
    levels = level_ns * np.exp(0.03 * rng.standard_normal((blocks, 1)))
    return levels * (1 + 0.1 * rng.exponential(size=(blocks, calls)))


def test_a_planted_difference_of_ten_percent_is_found(measured):
    rng = np.random.default_rng(1)
    found = speedup(measured(noisy(rng, 1.1e6)), measured(noisy(rng, 1.0e6)))
    assert found.low > 1.05
    assert found.low < 1.1 < found.high


def test_two_alike_are_not_told_apart(measured):
    rng = np.random.default_rng(2)
    found = speedup(measured(noisy(rng, 1e6)), measured(noisy(rng, 1e6)))
    assert found.low < 1 < found.high


def test_intervals_cover_the_truth_about_as_often_as_they_say(measured):
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        found = speedup(measured(noisy(rng, 1.2e6)), measured(noisy(rng, 1e6)))
        covered += found.low <= 1.2 <= found.high
    assert 86 <= covered <= 100


def test_what_both_saw_of_the_machine_cancels(measured):
    machine = np.linspace(1, 3, 20)[:, None]
    found = speedup(measured(machine * [[1.5e6] * 5]), measured(machine * [[1e6] * 5]))
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)


def test_a_stall_in_single_calls_does_not_move_the_speedup(measured):
    blocks = np.full((20, 9), 1e6)
    stalled = blocks.copy()
    stalled[:, 4] = 500e6
    assert speedup(measured(blocks), measured(stalled)).value == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 3))
def test_the_speedup_of_the_exchanged_is_the_inverse(seed, ratio):
    rng = np.random.default_rng(seed)
    pair = [raw(noisy(rng, 1e6)), raw(noisy(rng, 1e6 * ratio))]
    there, back = speedup(*pair), speedup(*reversed(pair))
    assert there.value * back.value == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1, rel=0.01)


def raw(blocks: np.ndarray) -> Measurement:
    return Measurement(
        name="m", backend="fake", batch_size=1, options=SessionOptions(), load_ns=1,
        first_run_ns=1, warmup_runs=1, blocks_ns=blocks.astype(int).tolist(), peak_rss_bytes=1,
        placement=Placement(provider="fake", precisions={}),
    )  # fmt: skip


def test_the_same_times_give_the_same_interval(measured):
    rng = np.random.default_rng(4)
    pair = measured(noisy(rng, 1e6)), measured(noisy(rng, 1e6))
    assert speedup(*pair) == speedup(*pair)


def test_throughput_counts_samples_by_the_time_of_their_calls(measured):
    # 15 blocks of one call of 1 ms and three of 3 ms: 60 calls of 4 samples in 150 ms.
    found = throughput(measured([[1e6, 3e6, 3e6, 3e6]] * 15, batch_size=4))
    assert found.value == pytest.approx(1600)
    assert found.low == found.high == found.value


def test_throughput_has_an_interval_over_blocks(measured):
    rng = np.random.default_rng(5)
    found = throughput(measured(noisy(rng, 1e6), batch_size=8))
    assert found.low < 8 / 1.1e-3 < found.high
    assert found.high / found.low < 1.1


@pytest.mark.parametrize(("percent", "least"), [(50, 7), (90, 64), (99, 459), (99.9, 4603)])
def test_a_percentile_asks_for_as_many_calls_as_loadgen(percent, least):
    assert minimum_samples(percent) == least


def test_a_percentile_of_too_few_calls_is_not_given(measured):
    blocks = np.arange(1, 459)  # 458 calls
    m = measured(np.array_split(blocks * 1e6, 20))
    assert percentile_ms(m, 99) is None
    assert percentile_interval_ms(m, 99) is None
    assert percentile_ms(m, 90) == 413  # rank ceil(0.9 * 458)


def test_a_percentile_is_a_time_that_was_observed(measured):
    m = measured(np.arange(1, 1001).reshape(20, 50) * 1e6)
    assert percentile_ms(m, 50) == 500
    assert percentile_ms(m, 99) == 990


def test_the_interval_of_a_percentile_is_over_blocks(measured):
    # A tail that sits in one block of twenty is nothing that one could rely on.
    blocks = np.full((20, 50), 1e6)
    blocks[7] = 9e6
    found = percentile_interval_ms(measured(blocks), 99)
    assert (found.low, found.value, found.high) == (1, 9, 9)
    spread = np.full((20, 50), 1e6)
    spread[:, ::25] = 9e6
    found = percentile_interval_ms(measured(spread), 99)
    assert (found.low, found.value, found.high) == (9, 9, 9)


def test_invalid_and_short_measurements_are_refused_by_name(measured):
    good = measured([[1e6]] * 15)
    with pytest.raises(InputError, match="broken has no valid times: it crashed"):
        speedup(good, measured([[1e6]] * 15, name="broken", invalid="it crashed"))
    with pytest.raises(InputError, match="short: 14 blocks"):
        throughput(measured([[1e6]] * 14, name="short"))
    with pytest.raises(InputError, match="side by side"):
        speedup(good, measured([[1e6]] * 16))
    with pytest.raises(InputError, match="side by side"):
        speedup(good, measured([[1e6]] * 15, batch_size=2))


def interval(low: float, value: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high)


@pytest.mark.parametrize(
    ("found", "noise", "claim"),
    [
        (interval(1.1, 1.2, 1.3), interval(0.98, 1.0, 1.02), True),
        (interval(0.9, 1.2, 1.3), interval(0.98, 1.0, 1.02), False),  # may be 1
        (interval(1.01, 1.02, 1.03), interval(0.98, 1.01, 1.04), False),  # no more than noise
        (interval(1.01, 1.02, 1.03), interval(0.95, 0.97, 0.99), False),  # noise the other way
        (interval(0.7, 0.8, 0.9), interval(0.98, 1.0, 1.02), False),  # slower
    ],
)
def test_faster_needs_an_interval_above_one_and_more_than_noise(found, noise, claim):
    assert faster(found, noise) is claim


@pytest.mark.parametrize(
    ("medians", "drifts"),
    [
        ([100] * 50, False),
        ([int(100 * 1.02**i) for i in range(50)], True),
        ([int(1000 / 1.02**i) for i in range(50)], True),
        ([1000] * 10 + [100] * 40, False),  # warm long ago
        ([100] * 33 + [200] * 17, False),  # a neighbour came: one step
        ([100] * 37 + [200] * 13, False),
        ([100] * 42 + [200] * 8, False),
        ([100, 100, 130, 160, 190], False),  # too few to tell
    ],
)
def test_drift_is_a_direction_not_noise_nor_a_step(medians, drifts):
    assert (drift(medians) is not None) is drifts


def test_a_trend_over_a_run_is_told_with_its_levels(measured):
    rising = measured([[1e6 * (1 + 0.01 * i)] * 3 for i in range(30)])
    first, last = trend(rising)
    assert first == pytest.approx(1.045e6, rel=0.01)
    assert last == pytest.approx(1.245e6, rel=0.01)
    assert trend(measured([[1e6]] * 30)) is None
    assert trend(measured([[1e6 * (1 + 0.001 * i)] for i in range(30)])) is None  # 2 % in all
    assert trend(measured([[1e6 * (1 + i)] for i in range(5)])) is None  # too few to tell


def test_energy_is_what_the_samples_of_the_timed_calls_took(measured):
    blocks = measured([[1e6] * 10] * 20, batch_size=4)
    told = blocks.model_copy(update={"energy_uj": {"CPU packages": (80_000,) * 20}})
    assert energy_mj(told)["CPU packages"].value == pytest.approx(2)  # 80 mJ for 40 samples
    assert energy_mj(blocks) == {}


def test_noise_is_seldom_taken_for_drift():
    rng = np.random.default_rng(6)
    for _ in range(500):
        noise = np.exp(0.2 * rng.standard_normal(50))
        shared = 1 + (rng.random(50) < 0.4)  # a neighbour takes every other time slice
        assert drift(100 * noise) is None
        assert drift(100 * shared * noise**0.2) is None


def grouped(rng: np.random.Generator, level_ns: float, processes: int = 8, blocks: int = 12):
    """Processes whose levels differ by 3 % while the spread inside each is small."""
    levels = np.repeat(0.03 * rng.standard_normal(processes), blocks)
    blocks_ns = level_ns * np.exp(levels + 0.005 * rng.standard_normal(processes * blocks))
    measurement = raw(np.repeat(blocks_ns[:, None], 5, axis=1))
    return measurement.model_copy(update={"process_blocks": (blocks,) * processes})


@pytest.mark.parametrize("processes", [3, 8])
def test_the_spread_between_processes_is_in_the_interval(processes):
    rng = np.random.default_rng(7)
    covered = {True: 0, False: 0}
    for _ in range(100):
        pair = [grouped(rng, 1e6, processes) for _ in range(2)]
        alone = [m.model_copy(update={"process_blocks": ()}) for m in pair]
        for together, (one, other) in ((True, pair), (False, alone)):
            found = speedup(one, other)
            covered[together] += found.low <= 1 <= found.high
    assert covered[True] >= 89  # 95 less three standard errors
    assert covered[False] <= 70  # blocks alone take a process's own level for a difference


def test_a_percentile_s_interval_has_the_spread_between_processes():
    rng = np.random.default_rng(8)
    found = percentile_interval_ms(grouped(rng, 1e6), 50)
    assert found.high / found.low > 1.015


def test_holm_is_the_textbook_s():
    # Holm 1979: the smallest times 4, the next times 3 and so on, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_lowers(p_values):
    found = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, found, strict=True))
    order = sorted(range(len(found)), key=lambda i: p_values[i])
    assert [found[i] for i in order] == sorted(found)


def test_the_bound_of_a_percentile_is_not_above_it_too_often(measured):
    rng = np.random.default_rng(9)
    truth = float(np.exp(2.3263 * 0.1))  # p99 of a log-normal with sigma 0.1, in ms
    above = 0
    for _ in range(200):
        calls = np.exp(0.1 * rng.standard_normal((15, 10))) * 1e6
        above += percentile_bound_ms(measured(calls), 99) > truth
    assert above <= 20
    assert percentile_bound_ms(measured(np.arange(1, 301).reshape(15, 20) * 1e6), 50) == 136
