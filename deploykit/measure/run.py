"""The benchmark itself: rounds of fresh processes, timed in blocks that take turns at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path
from statistics import median_low
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np

from deploykit import environment
from deploykit._lazy import INSTALL, installed
from deploykit.dataset import Dataset
from deploykit.errors import MissingError, UsageError
from deploykit.measure import feeds, host
from deploykit.measure.child import WORKER
from deploykit.measure.drift import trend
from deploykit.measure.instances import split_cores, together
from deploykit.measure.lane import Lane, Setup
from deploykit.measure.meters import CPU, GPU
from deploykit.measure.result import (
    MIN_BLOCKS,
    BenchOptions,
    BenchResult,
    Candidate,
    Instances,
    ScenarioRun,
    SloSearch,
)
from deploykit.measure.scenarios import Player, highest_rate, parse_slo, size_for
from deploykit.values import Measurement

Progress = Callable[[str, int, int], None]
"""(what is done now, steps done, steps in all)"""

PATIENCE = 2
"""A round whose blocks take this many times the planned time ends early, at MIN_BLOCKS or later."""
MIN_PROCESSES, LONG = 3, 4
"""With so many processes each, a run ends that has taken so many times what was planned."""

METERS = (CPU, GPU)


def bench(
    candidates: Sequence[Candidate],
    options: BenchOptions,
    *,
    data: Dataset | None,
    progress: Progress | None = None,
    worker: Sequence[str] = WORKER,
) -> BenchResult:
    """Measure candidates side by side; the first is the baseline, and is measured twice.

    Each runs in several processes, one after the other (`worker` is their command), pinned to the
    same cores; only one works at a time. `data=None` asks for random inputs, and the result says
    so. A candidate that fails, hangs, crashes, gives wrong outputs, or ran in another place or
    precision than asked for has an `invalid` measurement; the others go on.
    Raises UsageError or InputError: the models, the data and the options do not fit together.
    MissingError: scenarios are asked for, and LoadGen is not installed.
    ResourceError: no space for the pool of feeds.
    """
    _check(candidates, options)
    setup = Setup(options, host.choose_cores(options.threads), worker)
    control = candidates[0].model_copy(update={"name": f"{candidates[0].name} (again)"})
    run = _Run([*candidates, control], setup, data, progress or _silent)
    before = environment.read()
    ticks, busy, own = host.cpu_ticks(), host.busy_ticks(), host.own_ticks()
    for batch_size in dict.fromkeys(options.batch_sizes):
        run.measure(batch_size)
    steal = host.steal_share(ticks, host.cpu_ticks())
    others = host.others_share(busy, host.busy_ticks(), host.own_ticks() - own)
    disturbances = [*host.notes(before, steal, others), *_drifts(run.measurements)]
    return BenchResult(
        baseline=candidates[0].name,
        control=control.name,
        measurements=tuple(run.measurements),
        instances=tuple(run.instances),
        scenarios=tuple(run.scenarios),
        slos=tuple(run.slos),
        options=options,
        inputs="real" if data else "random",
        data_digest=data.digest if data else None,
        environment=before,
        load_average_after=os.getloadavg()[0],
        frequency_mhz_after=environment.read().frequency_mhz,
        steal_share=steal,
        others_share=others,
        disturbances=tuple(disturbances),
        notes=(*_notes(options, data), *disturbances, *run.notes),
    )


def _check(candidates: Sequence[Candidate], options: BenchOptions) -> None:
    if not candidates:
        raise UsageError("no model to measure", hint="give at least one")
    names = [c.name for c in candidates] + [f"{candidates[0].name} (again)"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two models are called {twice[0]!r}", hint="give each its own name")
    feeds.check_batch_sizes(candidates, options.batch_sizes)
    if options.slo:
        parse_slo(options.slo)
    if (options.slo or options.scenarios) and not installed("mlperf_loadgen"):
        raise MissingError("LoadGen is not installed", hint=INSTALL["mlperf_loadgen"])


def _notes(options: BenchOptions, data: Dataset | None) -> list[str]:
    found = []
    if options.preset == "quick":
        found.append("quick: NOT COMPARABLE with the numbers of another run")
    if data is None:
        found.append("inputs are random: real data may take another time")
    return found


def _drifts(measurements: Sequence[Measurement]) -> list[str]:
    """Engines whose times moved one way over the run."""
    found = []
    for m in measurements:
        if not m.invalid and (levels := trend(m)):
            first, last = (level / 1e6 for level in levels)
            found.append(
                f"{m.name} (batch {m.batch_size}): a call went from {first:.3g} to {last:.3g} ms "
                "over the run"
            )
    return found


def _silent(what: str, done: int, steps: int) -> None:
    del what, done, steps


class _Run:
    """Batch size after batch size, and for each of these round after round of fresh processes."""

    def __init__(
        self, entries: list[Candidate], setup: Setup, data: Dataset | None, progress: Progress
    ) -> None:
        self.measurements: list[Measurement] = []
        self.instances: list[Instances] = []
        self.scenarios: list[ScenarioRun] = []
        self.slos: list[SloSearch] = []
        self._notes: dict[str, None] = {}
        self._entries, self._setup, self._data, self._progress = entries, setup, data, progress
        self._rng = np.random.default_rng(setup.options.seed)
        self._done = 0
        effort = setup.options.effort
        self._blocks = ceil(effort.blocks / effort.processes)
        self._per_round = 2 * len(entries) + self._blocks
        at_once = len(set(setup.options.instances)) * (len(entries) - 1)
        per_size = effort.processes * self._per_round + at_once
        played = len(set(setup.options.scenarios)) + bool(setup.options.slo)
        self._steps = len(set(setup.options.batch_sizes)) * per_size + played * (len(entries) - 1)

    @property
    def notes(self) -> list[str]:
        """What a reader must know, each once."""
        return list(self._notes)

    def measure(self, batch_size: int) -> None:
        """Add the measurements of every entry at one batch size."""
        parts: dict[str, list[Measurement]] = {entry.name: [] for entry in self._entries}
        with TemporaryDirectory(prefix="deploykit-bench-") as name:
            pool = Path(name) / "pool.npz"
            made = feeds.make_pool(self._entries, batch_size, self._data, self._rng)
            feeds.write(pool, made)
            if len(made) == 1:
                self._note(f"every call at batch {batch_size} ran on the same input, and no other")
            for number in self._rounds():
                good = [e for e in self._entries if not any(p.invalid for p in parts[e.name])]
                for part in self._round(good, batch_size, pool, number):
                    parts[part.name].append(part)
            good = [e for e in self._entries[:-1] if not any(p.invalid for p in parts[e.name])]
            for entry, count in product(good, dict.fromkeys(self._setup.options.instances)):
                self._step(f"{count} at once: {entry.name}")
                threads = self._setup.options.threads
                cores = split_cores(host.usable_cores(), count, threads)
                self.instances.append(together(entry, batch_size, cores, self._setup, pool))
            self.measurements.extend(merged(each) for each in parts.values())
            for entry in good:
                self._play(entry, merged(parts[entry.name]), pool)
        if parts[self._entries[0].name][-1].invalid:
            label = f"{self._entries[0].name} (batch {batch_size})"
            self._note(f"{label} is invalid: there is nothing to compare with")

    def _play(self, entry: Candidate, measured: Measurement, pool: Path) -> None:
        """The scenarios of this batch size."""
        options = self._setup.options
        if not (options.scenarios or options.slo):
            return
        cores = host.choose_cores(min(options.threads + 1, len(host.usable_cores())))
        player = Player(entry, measured, replace(self._setup, affinity=cores), pool)
        for scenario in dict.fromkeys(options.scenarios):
            if measured.batch_size == size_for(scenario, options.batch_sizes):
                self._step(f"{scenario}: {entry.name}")
                self.scenarios.append(player.play(scenario))
        if options.slo and measured.batch_size == size_for("server", options.batch_sizes):
            show = lambda text: self._progress(f"{entry.name}: {text}", self._done, self._steps)  # noqa: E731
            self._step(f"{options.slo}: {entry.name}")
            self.slos.append(highest_rate(player, options.slo, show))

    def _rounds(self) -> Iterator[int]:
        """Numbers of rounds, fewer where what surrounds the timing takes long."""
        effort = self._setup.options.effort
        planned = len(self._entries) * (effort.blocks * effort.block_ms / 1e3 + effort.processes)
        began = monotonic()
        for number in range(effort.processes):
            enough = number >= MIN_PROCESSES and number * self._blocks >= MIN_BLOCKS
            if enough and monotonic() - began > LONG * planned:
                self._note(f"{number} processes instead of {effort.processes}: loading is long")
                self._done += (effort.processes - number) * self._per_round
                return
            yield number

    def _round(
        self, entries: list[Candidate], batch_size: int, pool: Path, number: int
    ) -> list[Measurement]:
        """One process for each entry; who is first to open takes turns."""
        first = number % len(entries) if entries else 0
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="deploykit-bench-")))
            lanes: list[Lane] = []
            for index, entry in enumerate(entries[first:] + entries[:first]):
                self._step(f"loading {entry.name}")
                lane = Lane(entry, batch_size, self._setup, folder / str(index))
                lanes.append(stack.enter_context(lane))
                lane.open(pool)
            lanes.sort(key=lambda lane: entries.index(lane.candidate))
            for lane in lanes:
                self._step(f"warming up {lane.label}")
                lane.compare(next(o for o in lanes if o.candidate.family == lane.candidate.family))
                lane.warm_up()
            self._time(lanes)
            for lane in lanes:
                lane.finish(account=number == 0)
                self._notes.update(dict.fromkeys(lane.notes))
            self._done += 2 * (len(self._entries) - len(entries))
            return [lane.measurement() for lane in lanes]

    def _time(self, lanes: Sequence[Lane]) -> None:
        """Blocks of all lanes, in a new random order each time."""
        effort = self._setup.options.effort
        least = ceil(MIN_BLOCKS / effort.processes)
        left = PATIENCE * self._blocks * len(lanes) * effort.block_ms / 1e3
        for index in range(self._blocks):
            if index >= least and left < 0:
                self._note(f"{index} blocks a process instead of {self._blocks}: calls are long")
                self._done += self._blocks - index
                return
            self._step("timing")
            for turn in self._rng.permutation(len(lanes)):
                began = monotonic()
                lanes[turn].time(index)
                left -= 0 if lanes[turn].invalid else monotonic() - began

    def _note(self, text: str) -> None:
        self._notes[text] = None

    def _step(self, what: str) -> None:
        self._progress(what, self._done, self._steps)
        self._done += 1


def merged(parts: Sequence[Measurement]) -> Measurement:
    """The measurement of an engine from those of its processes, in order; at least one.

    What is told once (the placement, the cosines) is the first process's.
    """
    blocks = sum(len(part.blocks_ns) for part in parts)
    energy = {m: tuple(e for p in parts for e in p.energy_uj.get(m, ())) for m in METERS}
    devices = [p.device_memory_bytes for p in parts if p.device_memory_bytes is not None]
    invalid = next((part.invalid for part in parts if part.invalid), None)
    return parts[0].model_copy(
        update={
            "load_ns": median_low(part.load_ns for part in parts),
            "first_run_ns": median_low(part.first_run_ns for part in parts),
            "loads_ns": tuple(part.load_ns for part in parts),
            "first_runs_ns": tuple(part.first_run_ns for part in parts),
            "yardsticks_ns": tuple(time for part in parts for time in part.yardsticks_ns),
            "warmup_runs": sum(part.warmup_runs for part in parts),
            "blocks_ns": tuple(block for part in parts for block in part.blocks_ns),
            "process_blocks": tuple(len(part.blocks_ns) for part in parts),
            "peak_rss_bytes": max(part.peak_rss_bytes for part in parts),
            "device_memory_bytes": max(devices, default=None),
            "energy_uj": {m: told for m, told in energy.items() if told and len(told) == blocks},
            "invalid": invalid,
        }
    )
