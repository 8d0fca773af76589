"""Scenarios that MLPerf LoadGen drives, each in a fresh process; no MLPerf results.

Server latency counts from the time that a request was scheduled at, so that a stall is not hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from deploykit.errors import UsageError
from deploykit.measure import statistics
from deploykit.measure.lane import Lane, Setup
from deploykit.measure.protocol import Drive, Driven, Scenario
from deploykit.measure.result import Candidate, Preset, ScenarioRun, SloSearch
from deploykit.values import Measurement

SECONDS: dict[Preset, float] = {"quick": 10, "standard": 60, "full": 600}
STREAMS = 8
"""Samples of one query of the multi-stream scenario, as MLPerf has it."""
PERCENT: dict[Scenario, float] = {
    "single-stream": 90, "multi-stream": 99, "offline": 99, "server": 99,
}  # fmt: skip
"""The percentile that LoadGen judges, as MLPerf has it."""
MULTI_STREAM = 662
"""Queries of the multi-stream scenario by which LoadGen tells p99."""
NO_BOUND_NS = 10**10
MARGIN = 2
"""LoadGen prepares so many times what an engine seems to need; with too few queries it stops."""
HALF = 0.5
"""Share of an engine's own throughput that the server scenario sends where no rate is given."""
PROBES, PROBE_SHARE, CONFIRMATIONS, STEP_DOWN = 6, 0.2, 5, 0.95
"""Steps of the bisection; their share of the full time; tries to confirm, and the step between."""
PATIENCE = 3
"""A scenario is stopped at so many times what it should take."""
OTHER_SEED = 7919


class Slo(NamedTuple):
    """A percentile, in percent, and the latency that it must not exceed."""

    percent: float
    latency_ns: int


def parse_slo(text: str) -> Slo:
    """`p99=5ms`. Raises UsageError: of another form."""
    units = {"us": 1e3, "ms": 1e6, "s": 1e9}
    match = re.fullmatch(r"p(\d+(?:\.\d+)?)=(\d+(?:\.\d+)?)(us|ms|s)", text)
    if not match or not 0 < float(match[1]) < 100 or not float(match[2]):
        raise UsageError(f"--slo {text!r} is no latency objective", hint="write p99=5ms")
    return Slo(float(match[1]), round(float(match[2]) * units[match[3]]))


class Player:
    """One engine, measured already, that scenarios are played with."""

    def __init__(
        self, candidate: Candidate, measured: Measurement, setup: Setup, pool: Path
    ) -> None:
        self._candidate, self._measured, self._setup, self._pool = candidate, measured, setup, pool
        calls = statistics.throughput(measured).value / measured.batch_size
        self.calls_per_second = calls

    @property
    def seconds(self) -> float:
        """The preset's time for a scenario."""
        return SECONDS[self._setup.options.preset]

    def play(
        self,
        scenario: Scenario,
        *,
        rate: float | None = None,
        slo: Slo | None = None,
        seconds: float | None = None,
        seed: int = 0,
    ) -> ScenarioRun:
        """Play one scenario; `rate` is in samples a second, for server and offline."""
        options, size = self._setup.options, self._measured.batch_size
        bound = slo or Slo(PERCENT[scenario], NO_BOUND_NS)
        request = Drive(
            scenario=scenario,
            seconds=seconds or self.seconds,
            seed=options.seed + seed,
            batch_size=size,
            rate=rate or self._rate(scenario),
            streams=STREAMS,
            percent=bound.percent,
            latency_ns=bound.latency_ns,
            min_queries=_min_queries(scenario, bound.percent),
            folder=Path("log"),
        )
        lane, driven = self._driven(request)
        return ScenarioRun(
            name=self._candidate.name,
            batch_size=size,
            scenario=scenario,
            seconds=request.seconds,
            seed=request.seed,
            rate=request.rate if scenario == "server" else None,
            affinity=self._setup.affinity,
            invalid=lane.invalid,
            **_told(driven) if driven and not lane.invalid else {},
        )

    def _driven(self, request: Drive) -> tuple[Lane, Driven | None]:
        """The scenario in a process of its own, its outputs compared before and after."""
        with TemporaryDirectory(prefix="deploykit-bench-") as name:
            folder = Path(name) / "lane"
            with Lane(self._candidate, request.batch_size, self._setup, folder) as lane:
                lane.open(self._pool)
                lane.warm_up()
                asked = request.model_copy(update={"folder": folder / "log"})
                driven = lane.drive(asked, PATIENCE * self._expected_seconds(request))
                lane.finish(account=False)
                return lane, driven

    def _rate(self, scenario: Scenario) -> float:
        calls = self.calls_per_second
        match scenario:
            case "single-stream":
                return MARGIN * calls
            case "multi-stream":
                return MARGIN * calls / ceil(STREAMS / self._measured.batch_size)
            case "offline":
                return MARGIN * calls * self._measured.batch_size
            case "server":
                return HALF * calls

    def _expected_seconds(self, request: Drive) -> float:
        each = {"multi-stream": STREAMS / self.calls_per_second, "server": 1 / request.rate}
        least = request.min_queries * each.get(request.scenario, 1 / self.calls_per_second)
        return max(request.seconds * (MARGIN if request.scenario == "offline" else 1), least)


def highest_rate(player: Player, text: str, step: Callable[[str], None]) -> SloSearch:
    """The highest rate of Poisson arrivals that holds the objective, by bisection.

    A probe holds where no more queries are late than the percentile allows. What is found is
    confirmed by LoadGen's own verdict, for the preset's full time and with another seed; where it
    is not, the rate is lowered by 5 %, up to CONFIRMATIONS times.
    """
    slo, runs = parse_slo(text), list[ScenarioRun]()

    def play(rate: float, seconds: float, seed: int) -> ScenarioRun:
        step(f"{rate:.4g} a second: does {text} hold?")
        runs.append(player.play("server", rate=rate, slo=slo, seconds=seconds, seed=seed))
        return runs[-1]

    low, high = 0.0, player.calls_per_second
    for _ in range(PROBES):
        middle = (low + high) / 2
        probe = play(middle, player.seconds * PROBE_SHARE, 0)
        if not probe.invalid and probe.late <= (1 - slo.percent / 100) * probe.queries:
            low = middle
        else:
            high = middle
        if runs[-1].invalid:
            break
    confirmed = None
    for number in range(CONFIRMATIONS if low else 0):
        rate = low * STEP_DOWN**number
        if play(rate, player.seconds, OTHER_SEED).valid:
            confirmed = rate
            break
    return SloSearch(
        name=runs[0].name,
        batch_size=runs[0].batch_size,
        slo=text,
        rate=confirmed,
        runs=tuple(runs),
        invalid=next((run.invalid for run in runs if run.invalid), None),
    )


def _min_queries(scenario: Scenario, percent: float) -> int:
    """The fewest by which LoadGen may judge the percentile; one query is all of offline."""
    if scenario == "offline":
        return 1
    return MULTI_STREAM if scenario == "multi-stream" else statistics.minimum_samples(percent)


def size_for(scenario: Scenario, sizes: Sequence[int]) -> int:
    """The batch size that a scenario is played at: the largest for offline, else the smallest."""
    return max(sizes) if scenario == "offline" else min(sizes)


def _told(driven: Driven) -> dict[str, object]:
    """The fields of a ScenarioRun; a percentile only where the queries are enough to tell it."""
    enough = {
        f"p{p}": time / 1e6
        for p, time in driven.latencies_ns.items()
        if driven.queries >= statistics.minimum_samples(float(p))
    }
    return {
        "queries": driven.queries,
        "samples_per_second": driven.per_second,
        "latencies_ms": enough,
        "late": driven.late,
        "valid": driven.valid,
        "reason": driven.reason or ("" if driven.valid else driven.early_stopping),
        "early_stopping": driven.early_stopping,
        "loadgen": driven.version,
    }
