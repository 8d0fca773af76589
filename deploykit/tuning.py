"""Which model a server runs, and its batch size, copies, threads and queue delay, under an SLO.

All of it is chosen by measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor
from typing import Literal

import numpy as np
from pydantic import Field

from deploykit import environment
from deploykit.dataset import Dataset
from deploykit.environment import Environment
from deploykit.errors import AnswerIsNo, ResourceError
from deploykit.measure import BenchOptions, Candidate, bench, host
from deploykit.measure.result import Instances
from deploykit.measure.scenarios import Slo, parse_slo
from deploykit.measure.statistics import minimum_samples, throughput_together
from deploykit.values import Value

SIZES = (1, 2, 4, 8, 16, 32)
TOLD = ("max_batch_size", "instances", "threads", "queue_delay_us")
"""Options of a bundle that are chosen here."""
NOTES = (
    "times are of the engine, all copies at once: what the server adds to a request is not in them",
    "a request waits for the queue, then for at most one batch before its own",
)
NOT_COMPARED = "of several models the fastest is taken, their scores are not compared here"
Progress = Callable[[str, int, int], None]


class Tried(Value):
    """What was measured of one setting."""

    model: str
    precision: str
    threads: int
    instances: int
    batch_size: int
    call_ms: float
    """The percentile of the objective over all calls; the slowest call where they are too few."""
    samples_per_second: float
    """Of all copies together."""

    def longest_ms(self) -> float:
        """A request that comes just after a batch began: that one, then its own."""
        return 2 * self.call_ms


class Tuned(Value):
    """The setting that was chosen, with all that were measured."""

    schema_: Literal["deploykit.tuning/1"] = Field(default="deploykit.tuning/1", alias="schema")
    slo: str
    chosen: Tried
    queue_delay_us: int
    tried: tuple[Tried, ...]
    notes: tuple[str, ...]
    environment: Environment

    @property
    def options(self) -> dict[str, int]:
        """What was chosen, as options of a bundle."""
        return {
            "max_batch_size": self.chosen.batch_size,
            "instances": self.chosen.instances,
            "threads": self.chosen.threads,
            "queue_delay_us": self.queue_delay_us,
        }


def tune(candidates: Sequence[Candidate], slo: str, *, data: Dataset, progress: Progress) -> Tuned:
    """Measure copies that fill this machine's cores, of each model at each batch size, and choose.

    Raises UsageError: the objective is none. AnswerIsNo: no setting holds it. ResourceError: a
    model could not be measured.
    """
    objective, tried, notes = parse_slo(slo), [], list(NOTES)
    notes += [NOT_COMPARED] if len(candidates) > 1 else []
    for candidate in candidates:
        found, disturbances = _measured(candidate, objective, data, progress)
        tried += found
        notes += [note for note in disturbances if note not in notes]
    chosen, delay_us = choose(tried, objective)
    return Tuned(slo=slo, chosen=chosen, queue_delay_us=delay_us, tried=tuple(tried),
                 notes=tuple(notes), environment=environment.read())  # fmt: skip


def _measured(
    candidate: Candidate, objective: Slo, data: Dataset, progress: Progress
) -> tuple[list[Tried], list[str]]:
    """The settings of one model, and what disturbed them. Raises ResourceError: none is valid."""
    fixed = candidate.artifact.inputs[0].shape[0]
    sizes = (fixed,) if isinstance(fixed, int) else SIZES
    tried: list[Tried] = []
    disturbances: list[str] = []
    cores = max(1, len(host.usable_cores()))
    for threads in _powers(cores):
        options = BenchOptions(
            batch_sizes=sizes, instances=(cores // threads,), threads=threads,
            preset="quick", processes=1, blocks=15, block_ms=20, warmup_ms=50,
        )  # fmt: skip
        result = bench([candidate], options, data=data, progress=progress)
        disturbances += result.disturbances
        tried += [_tried(candidate, found, threads, objective) for found in result.instances
                  if not found.invalid]  # fmt: skip
    if not tried:
        raise ResourceError(
            f"{candidate.name} could not be measured: no setting gave valid times",
            hint="see `deploykit bench` on it for the reason",
        )
    return tried, disturbances


def choose(tried: Iterable[Tried], slo: Slo) -> tuple[Tried, int]:
    """The setting of most samples a second that holds the objective, and its queue delay in us.

    The delay is what is left of the objective, but no longer than a batch takes: by then the next
    one can begin. Raises AnswerIsNo: none holds it.
    """
    settings, limit_ms = list(tried), slo.latency_ns / 1e6
    holding = [each for each in settings if each.longest_ms() <= limit_ms]
    if not holding:
        best = min(settings, key=Tried.longest_ms)
        raise AnswerIsNo(
            f"no setting holds p{slo.percent:g} of {limit_ms:g} ms: the best needs "
            f"{best.longest_ms():.3g} ms ({best.model}, batch {best.batch_size}, "
            f"{best.instances} copies of {best.threads} threads)",
            hint="allow more, or take a faster model; nothing was written",
        )
    chosen = max(holding, key=lambda each: (each.samples_per_second, -each.call_ms))
    left_ms = min(limit_ms - chosen.longest_ms(), chosen.call_ms)
    return chosen, floor(1000 * left_ms) if chosen.batch_size > 1 else 0


def _tried(candidate: Candidate, found: Instances, threads: int, slo: Slo) -> Tried:
    calls = np.sort([call for copy in found.blocks_ns for block in copy for call in block])
    enough = len(calls) >= minimum_samples(slo.percent)
    rank = ceil(slo.percent / 100 * len(calls)) - 1 if enough else -1
    return Tried(
        model=candidate.name,
        precision=candidate.artifact.precision,
        threads=threads,
        instances=len(found.blocks_ns),
        batch_size=found.batch_size,
        call_ms=float(calls[rank]) / 1e6,
        samples_per_second=throughput_together(found).value,
    )


def _powers(cores: int) -> list[int]:
    """1, 2, 4, ... threads, as many as there are cores."""
    return [1 << n for n in range(cores.bit_length()) if 1 << n <= cores]
