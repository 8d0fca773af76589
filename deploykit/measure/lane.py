"""One candidate at one batch size: its process, and what it has given so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from deploykit.measure import feeds, outputs, proof
from deploykit.measure.child import Child, ChildError
from deploykit.measure.drift import drift
from deploykit.measure.protocol import (
    Drive,
    Driven,
    Finish,
    Finished,
    Open,
    Opened,
    Time,
    Timed,
    Warmed,
    WarmUp,
)
from deploykit.measure.result import BenchOptions, Candidate
from deploykit.values import Array, Measurement, Placement, SessionOptions, V, Value

MIN_WARMUP_RUNS, WARMUP_WINDOWS, WARMUP_LIMIT = 5, 5, 10
"""Calls at least; windows in the least warm-up time; how many times that it may take."""
PROFILE_RUNS = 10


@dataclass(frozen=True, slots=True)
class Setup:
    """What the lanes of a run have in common."""

    options: BenchOptions
    affinity: tuple[int, ...]
    worker: Sequence[str]


class Lane:
    """A candidate's way through a run. Once `invalid` is set its process is gone."""

    def __init__(self, candidate: Candidate, batch_size: int, setup: Setup, folder: Path) -> None:
        """Start the process; `folder` is made, for its files."""
        folder.mkdir()
        self.candidate, self.batch_size = candidate, batch_size
        self.invalid: str | None = None
        self.notes: list[str] = []
        self.before: list[dict[str, Array]] = []
        """Outputs of the first feeds, before timing."""
        self.blocks_ns: list[tuple[int, ...]] = []
        self.energy_uj: list[dict[str, int]] = []
        """Of each block."""
        self.cosines: dict[str, float] = {}
        self._setup, self._folder = setup, folder
        self._session_options = SessionOptions(threads=setup.options.threads)
        self._opened = Opened(load_ns=0, first_run_ns=0, yardstick_ns=0, affinity=())
        self._warmup_runs = 0
        self._finished = Finished(
            placement=Placement(provider="unknown", precisions={}), peak_rss_bytes=0
        )
        self._child = Child(setup.worker, folder, setup.options.threads)

    def open(self, pool: Path) -> None:
        """Load the model and keep its first outputs."""
        request = Open(
            artifact=self.candidate.artifact,
            backend=self.candidate.backend,
            options=self._session_options,
            affinity=self._setup.affinity,
            feeds=pool,
            outputs=self._folder / "before.npz",
        )
        if opened := self._ask(request, Opened):
            self._opened = opened
            self.before = feeds.read(request.outputs)
            self._void(outputs.not_finite(self.before))

    def compare(self, baseline: Lane) -> None:
        """Hold the outputs against the baseline's: a wrong output voids the times."""
        if self.invalid or not baseline.before:
            return
        specs = baseline.candidate.artifact.outputs
        self._void(outputs.mismatch(baseline.before, self.before, specs))
        if not self.invalid:
            self.cosines = outputs.cosines(baseline.before, self.before)
            self._void(outputs.uncorrelated(self.cosines, baseline.before))

    def warm_up(self) -> None:
        """Run until the times are steady; void if they drift in two warm-ups on end.

        Times that are merely noisy are no reason: noise is what the intervals are for.
        """
        warmed = self._warm_up()
        if warmed and _drift(warmed):
            warmed = self._warm_up()
        if warmed and (levels := _drift(warmed)):
            self._void(
                f"not steady after {self._warmup_runs} runs of warm-up: a call went from "
                f"{levels[0] / 1e6:.3g} to {levels[1] / 1e6:.3g} ms and on"
            )
        elif warmed and not warmed.steady:
            self.notes.append(f"{self.label}: noisy, its times did not settle within 5 %")

    def time(self, start: int) -> None:
        """Take one block, beginning with feed `start` of the pool."""
        request = Time(start=start, budget_ns=int(self._setup.options.effort.block_ms * 1e6))
        if timed := self._ask(request, Timed, request.budget_ns):
            self.blocks_ns.append(timed.calls_ns)
            self.energy_uj.append(timed.energy_uj)

    def drive(self, request: Drive, seconds: float) -> Driven | None:
        """Let LoadGen run a scenario; void if it takes longer than `seconds` and the silence."""
        return self._ask(request, Driven, int(seconds * 1e9))

    def finish(self, *, account: bool) -> None:
        """Run the first feeds again: outputs that changed void the times.

        `account` asks what really ran; another provider or precision voids the times too.
        """
        request = Finish(
            outputs=self._folder / "after.npz", profile_runs=PROFILE_RUNS if account else 0
        )
        if finished := self._ask(request, Finished):
            self._finished = finished
            after = feeds.read(request.outputs)
            self._void(outputs.not_finite(after) or outputs.changed(self.before, after))
            if account:
                self._judge_account(finished)

    @property
    def label(self) -> str:
        """Name and batch size."""
        return f"{self.candidate.name} (batch {self.batch_size})"

    def measurement(self) -> Measurement:
        """What was measured, or why it must not be used."""
        return Measurement(
            name=self.candidate.name,
            backend=self.candidate.backend,
            batch_size=self.batch_size,
            options=self._session_options,
            load_ns=self._opened.load_ns,
            first_run_ns=self._opened.first_run_ns,
            yardsticks_ns=(self._opened.yardstick_ns,) if self._opened.yardstick_ns else (),
            warmup_runs=self._warmup_runs,
            blocks_ns=tuple(self.blocks_ns),
            energy_uj=told_by_all(self.energy_uj),
            placement=self._finished.placement,
            kernels=self._finished.kernels,
            peak_rss_bytes=self._finished.peak_rss_bytes,
            device_memory_bytes=self._opened.device_bytes,
            affinity=self._opened.affinity,
            cosines=self.cosines,
            invalid=self.invalid,
        )

    def _warm_up(self) -> Warmed | None:
        least_ns = self._setup.options.effort.warmup_ms * 1e6
        request = WarmUp(
            min_runs=MIN_WARMUP_RUNS,
            window_ns=int(least_ns / WARMUP_WINDOWS),
            max_ns=int(least_ns * WARMUP_LIMIT),
        )
        warmed = self._ask(request, Warmed, request.max_ns)
        self._warmup_runs += warmed.runs if warmed else 0
        return warmed

    def _ask(self, request: Value, kind: type[V], expected_ns: int = 0) -> V | None:
        """The answer; None if the lane is out, from before or by this."""
        if self.invalid:
            return None
        try:
            return self._child.ask(
                request, kind, self._setup.options.max_seconds + expected_ns / 1e9
            )
        except ChildError as error:
            self._void(str(error))
            return None

    def _void(self, reason: str | None) -> None:
        if reason and not self.invalid:
            self.invalid = reason
            self._child.close()

    def _judge_account(self, finished: Finished) -> None:
        placement, asked = finished.placement, self.candidate.artifact.precision
        told = proof.provider_shares(placement, finished.kernels)
        other = proof.elsewhere(placement, told)
        if other and told.get(placement.provider, 0) < proof.LEAST_SHARE:
            self._void(other)
        elif other:
            self.notes.append(f"{self.label}: {other}")
        self._void(proof.other_precision(asked, placement))
        if not self.invalid and placement.precisions and asked not in placement.precisions:
            ran = ", ".join(f"{name} {count}" for name, count in placement.precisions.items())
            self.notes.append(f"{self.label}: the file is {asked}, the runtime ran {ran}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._child.close()


def told_by_all(blocks: Sequence[dict[str, int]]) -> dict[str, tuple[int, ...]]:
    """Microjoules of each block, of the meters that told all of them."""
    meters = [m for m in (blocks[0] if blocks else {}) if all(m in block for block in blocks)]
    return {meter: tuple(block[meter] for block in blocks) for meter in meters}


def _drift(warmed: Warmed) -> tuple[float, float] | None:
    return None if warmed.steady else drift(warmed.window_medians_ns)
