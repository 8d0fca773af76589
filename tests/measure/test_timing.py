from __future__ import annotations

import gc

import pytest

from deploykit.measure.protocol import WarmUp
from deploykit.measure.timing import MAX_BLOCK_CALLS, ImportClock, time_block, warm_up


class FakeClock:
    """Stands still but for what calls take."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def call(self, *durations: int, log: list[int] | None = None):
        """A call that takes the durations one after the other, then the last for ever."""
        left = list(durations)

        def run() -> None:
            duration = left.pop(0) if len(left) > 1 else left[0]
            self.now += duration
            if log is not None:
                log.append(duration)

        return run


def test_a_block_holds_the_true_times_for_its_budget():
    clock = FakeClock()
    assert time_block([clock.call(30)], 0, 100, clock) == (30, 30, 30, 30)


def test_what_begins_with_the_timed_calls_comes_after_the_cold_ones():
    clock, ran = FakeClock(), []
    call = clock.call(100, log=ran)
    begun: list[int] = []
    times = time_block([call], 0, 1000, clock, lambda: begun.append(len(ran)))
    assert begun == [len(ran) - len(times)]


def test_cold_calls_before_a_block_are_not_in_it():
    clock = FakeClock()
    times = time_block([clock.call(900, 100)], 0, 1000, clock)
    assert times == (100,) * 10


def test_the_pool_is_cycled_from_the_given_feed():
    clock = FakeClock()
    pool = [clock.call(10), clock.call(20), clock.call(30)]
    assert time_block(pool, 4, 90, clock) == (20, 30, 10, 20, 30)


def test_a_call_longer_than_the_budget_is_timed_once():
    clock = FakeClock()
    assert time_block([clock.call(10_000)], 0, 100, clock) == (10_000,)


def test_very_short_calls_end_the_block_early():
    clock = FakeClock()
    assert len(time_block([clock.call(1)], 0, 10**9, clock)) == MAX_BLOCK_CALLS


def test_the_garbage_collector_is_off_in_a_block_and_on_after_it():
    clock = FakeClock()
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        clock.now += 60
        if len(seen) == 3:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        time_block([call], 0, 1000, clock)
    assert seen == [False, False, False]
    assert gc.isenabled()


def plan(**changes: int) -> WarmUp:
    return WarmUp(**{"min_runs": 5, "window_ns": 100, "max_ns": 5000, **changes})


def test_warm_up_ends_when_times_are_steady():
    clock = FakeClock()
    warmed = warm_up([clock.call(*[500] * 4, 100)], plan(), clock)
    assert warmed.steady
    assert warmed.window_medians_ns == (500, 500, 500, 500, 100, 100, 100)
    assert warmed.runs == 7


def test_warm_up_runs_the_least_number_of_calls():
    clock = FakeClock()
    assert warm_up([clock.call(100)], plan(min_runs=30), clock).runs == 30


def test_warm_up_of_a_drifting_model_ends_when_time_is_up():
    clock = FakeClock()
    warmed = warm_up([clock.call(*range(100, 1000, 10))], plan(), clock)
    assert not warmed.steady
    assert clock.now < 6000


def test_warm_up_is_not_timed():
    clock = FakeClock()
    calls = [clock.call(*[999] * 6, 100)]
    warm_up(calls, plan(), clock)
    assert set(time_block(calls, 0, 1000, clock)) == {100}


def test_the_time_of_imports_is_counted_once(tmp_path, monkeypatch):
    (tmp_path / "fake_outer.py").write_text("import fake_inner\nfake_inner.CLOCK.now += 5\n")
    (tmp_path / "fake_inner.py").write_text("from tests_fake_clock import CLOCK\nCLOCK.now += 20\n")
    (tmp_path / "tests_fake_clock.py").write_text("import builtins\nCLOCK = builtins.fake_clock\n")
    monkeypatch.syspath_prepend(tmp_path)
    clock = FakeClock()
    monkeypatch.setattr("builtins.fake_clock", clock, raising=False)
    true_import = __import__
    with ImportClock(clock) as imports:
        import fake_outer  # noqa: F401

        clock.now += 1000
    assert imports.total_ns == 25
    assert __builtins__["__import__"] is true_import
