"""The timed loop and the warm-up before it. Calls take no argument: their data is in place."""

from __future__ import annotations

import builtins
import gc
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from statistics import median_low
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from deploykit.measure.protocol import Warmed, WarmUp

Calls = Sequence[Callable[[], object]]
Clock = Callable[[], int]

MAX_BLOCK_CALLS = 2000
"""A block of very short calls ends here, so that raw times stay a few megabytes."""
RAMP = 0.1
"""Share of a block's budget that runs untimed before it: caches are cold after another process."""
YARDSTICK_NS = 20_000_000
STEADY_WINDOWS, STEADY_SPREAD = 3, 1.05


def time_block(
    calls: Calls,
    start: int,
    budget_ns: int,
    clock_ns: Clock,
    begin: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """Nanoseconds of each call for about `budget_ns`, at least one; the pool is cycled.

    Before that it runs untimed for a tenth of the budget, at least one call; `begin` is called
    between the two. The garbage collector is off.
    """
    gc.disable()
    try:
        _run(calls, start, int(budget_ns * RAMP), clock_ns)
        begin()
        return tuple(_run(calls, start, budget_ns, clock_ns))
    finally:
        gc.enable()


def warm_up(calls: Calls, plan: WarmUp, clock_ns: Clock) -> Warmed:
    """Run windows of calls until the last three medians are within 5 %, or `max_ns` has passed.

    At least `min_runs` calls and five windows are run in any case.
    """
    medians: list[int] = []
    runs, began = 0, clock_ns()
    steady = False
    while not steady:
        calls_ns = _run(calls, runs, plan.window_ns, clock_ns)
        runs += len(calls_ns)
        medians.append(median_low(calls_ns))
        if runs < plan.min_runs or len(medians) < 5:
            continue
        last = medians[-STEADY_WINDOWS:]
        steady = max(last) <= min(last) * STEADY_SPREAD
        if clock_ns() - began >= plan.max_ns:
            break
    return Warmed(runs=runs, steady=steady, window_medians_ns=tuple(medians))


def yardstick(clock_ns: Clock) -> int:
    """Median time of a fixed piece of work: a product of two float32 matrices of 256 x 256.

    It tells whether the machine itself is as fast as it was in another run.
    """
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 256, 256), dtype=np.float32)
    _run([lambda: a @ b], 0, YARDSTICK_NS // 4, clock_ns)  # a processor wakes up first
    return median_low(_run([lambda: a @ b], 0, YARDSTICK_NS, clock_ns))


def _run(calls: Calls, start: int, budget_ns: int, clock_ns: Clock) -> list[int]:
    first = start % len(calls)
    times: list[int] = []
    deadline = clock_ns() + budget_ns
    for call in islice(cycle(calls), first, first + MAX_BLOCK_CALLS):
        before = clock_ns()
        call()
        after = clock_ns()
        times.append(after - before)
        if after >= deadline:
            break
    return times


class ImportClock:
    """Sums the wall time of import statements while it is entered; nested ones count once."""

    def __init__(self, clock_ns: Clock) -> None:
        self.total_ns = 0
        self._clock_ns = clock_ns
        self._depth = 0
        self._import = builtins.__import__

    def __enter__(self) -> Self:
        builtins.__import__ = self._timed
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        builtins.__import__ = self._import

    def _timed(self, name: str, *rest: Any, **named: Any) -> ModuleType:
        began = self._clock_ns()
        self._depth += 1
        try:
            return self._import(name, *rest, **named)
        finally:
            self._depth -= 1
            if not self._depth:
                self.total_ns += self._clock_ns() - began
