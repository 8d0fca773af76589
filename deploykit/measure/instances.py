"""Throughput of several instances of one engine at the same time, each in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from deploykit.measure.lane import Lane, Setup
from deploykit.measure.result import MIN_BLOCKS, Candidate, Instances


def together(
    candidate: Candidate, size: int, cores: Sequence[Sequence[int]], setup: Setup, pool: Path
) -> Instances:
    """Open one process for each of `cores`, and time MIN_BLOCKS blocks of all at once."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="deploykit-bench-")))
        threads = stack.enter_context(ThreadPoolExecutor(len(cores)))
        lanes = []
        for index, own in enumerate(cores):
            mine = replace(setup, affinity=tuple(own))
            lane = Lane(candidate, size, mine, folder / str(index))
            lanes.append(stack.enter_context(lane))
            lane.open(pool)
        list(threads.map(Lane.warm_up, lanes))
        for number in range(MIN_BLOCKS):
            list(threads.map(Lane.time, lanes, [number] * len(lanes)))
        used = [core for own in cores for core in own]
        return Instances(
            name=candidate.name,
            batch_size=size,
            blocks_ns=tuple(tuple(lane.blocks_ns) for lane in lanes),
            affinity=tuple(map(tuple, cores)),
            shared=len(used) > len(set(used)),
            invalid=next((lane.invalid for lane in lanes if lane.invalid), None),
        )


def split_cores(cores: Sequence[int], count: int, threads: int) -> list[tuple[int, ...]]:
    """Cores for each of `count` instances: `threads` of their own, as long as there are so many.

    Then they are given out again from the first.
    """
    if not cores:
        return [()] * count
    return [
        tuple(sorted(cores[(index * threads + i) % len(cores)] for i in range(threads)))
        for index in range(count)
    ]
