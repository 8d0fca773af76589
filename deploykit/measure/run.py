"""The benchmark itself: lanes opened one by one, then timed in blocks that take turns at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np

from deploykit import environment
from deploykit.dataset import Dataset
from deploykit.errors import UsageError
from deploykit.measure import feeds, host
from deploykit.measure.child import WORKER
from deploykit.measure.lane import Lane, Setup
from deploykit.measure.result import MIN_BLOCKS, BenchOptions, BenchResult, Candidate
from deploykit.values import Measurement

Progress = Callable[[str, int, int], None]
"""(what is done now, steps done, steps in all)"""

PATIENCE = 2
"""A run whose blocks take this many times the planned time ends early, at MIN_BLOCKS or later."""


def bench(
    candidates: Sequence[Candidate],
    options: BenchOptions,
    *,
    data: Dataset | None,
    progress: Progress | None = None,
    worker: Sequence[str] = WORKER,
) -> BenchResult:
    """Measure candidates side by side; the first is the baseline, and is measured twice.

    Each runs in a process of its own (`worker` is its command), pinned to the same cores; only one
    works at a time. `data=None` asks for random inputs, and the result says so. A candidate that
    fails, hangs, crashes or gives wrong outputs has an `invalid` measurement; the others go on.
    Raises UsageError or InputError: the models, the data and the options do not fit together.
    ResourceError: no space for the pool of feeds.
    """
    _check(candidates, options)
    setup = Setup(options, host.choose_cores(options.threads), worker)
    control = candidates[0].model_copy(update={"name": f"{candidates[0].name} (again)"})
    run = _Run([*candidates, control], setup, data, progress or _silent)
    before, ticks = environment.read(), host.cpu_ticks()
    for batch_size in dict.fromkeys(options.batch_sizes):
        run.measure(batch_size)
    steal = host.steal_share(ticks, host.cpu_ticks())
    return BenchResult(
        baseline=candidates[0].name,
        control=control.name,
        measurements=tuple(run.measurements),
        options=options,
        inputs="real" if data else "random",
        data_digest=data.digest if data else None,
        environment=before,
        load_average_after=os.getloadavg()[0],
        steal_share=steal,
        notes=(*_notes(options, data), *host.notes(before, steal), *run.notes),
    )


def _check(candidates: Sequence[Candidate], options: BenchOptions) -> None:
    if not candidates:
        raise UsageError("no model to measure", hint="give at least one")
    names = [c.name for c in candidates] + [f"{candidates[0].name} (again)"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two models are called {twice[0]!r}", hint="give each its own name")
    feeds.check_batch_sizes(candidates, options.batch_sizes)


def _notes(options: BenchOptions, data: Dataset | None) -> list[str]:
    found = []
    if options.preset == "quick":
        found.append("quick: NOT COMPARABLE with the numbers of another run")
    if data is None:
        found.append("inputs are random: real data may take another time")
    return found


def _silent(what: str, done: int, steps: int) -> None:
    del what, done, steps


class _Run:
    """All lanes of a run, batch size after batch size."""

    def __init__(
        self, entries: list[Candidate], setup: Setup, data: Dataset | None, progress: Progress
    ) -> None:
        self.measurements: list[Measurement] = []
        self.notes: list[str] = []
        self._entries, self._setup, self._data, self._progress = entries, setup, data, progress
        self._rng = np.random.default_rng(setup.options.seed)
        self._done = 0
        per_batch = 2 * len(entries) + setup.options.effort.blocks
        self._steps = len(set(setup.options.batch_sizes)) * per_batch

    def measure(self, batch_size: int) -> None:
        """Add the measurements of every entry at one batch size."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="deploykit-bench-")))
            pool = folder / "pool.npz"
            feeds.write(pool, feeds.make_pool(self._entries, batch_size, self._data, self._rng))
            lanes: list[Lane] = []
            for index, entry in enumerate(self._entries):
                self._step(f"loading {entry.name}")
                lane = Lane(entry, batch_size, self._setup, folder / str(index))
                lanes.append(stack.enter_context(lane))
                lane.open(pool)
            for lane in lanes:
                self._step(f"warming up {lane.label}")
                lane.compare(next(o for o in lanes if o.candidate.family == lane.candidate.family))
                lane.warm_up()
            self._time(lanes)
            for lane in lanes:
                lane.finish()
                self.notes.extend(lane.notes)
            self.measurements.extend(lane.measurement() for lane in lanes)
        if lanes[0].invalid:
            self.notes.append(f"{lanes[0].label} is invalid: there is nothing to compare with")

    def _time(self, lanes: Sequence[Lane]) -> None:
        """Blocks of all lanes, in a new random order each round."""
        effort = self._setup.options.effort
        left = PATIENCE * effort.blocks * len(lanes) * effort.block_ms / 1e3
        for index in range(effort.blocks):
            if index >= MIN_BLOCKS and left < 0:
                self.notes.append(f"{index} blocks instead of {effort.blocks}: calls are long")
                self._done += effort.blocks - index
                return
            self._step(f"timing at batch size {lanes[0].batch_size}")
            for turn in self._rng.permutation(len(lanes)):
                began = monotonic()
                lanes[turn].time(index)
                left -= 0 if lanes[turn].invalid else monotonic() - began

    def _step(self, what: str) -> None:
        self._progress(what, self._done, self._steps)
        self._done += 1
