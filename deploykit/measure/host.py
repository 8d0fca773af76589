"""The machine under a benchmark: its cores, its load, and what its hypervisor takes."""

from __future__ import annotations

import os
from pathlib import Path

from deploykit.environment import Environment
from deploykit.errors import UsageError

BUSY, STOLEN = 0.5, 0.01
"""Shares of the cores in use before a run, and of CPU time stolen during it, worth a note."""


def choose_cores(threads: int) -> tuple[int, ...]:
    """The first `threads` cores that this process may use; empty where that cannot be told.

    Raises UsageError: there are fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise UsageError(
            f"{threads} threads asked for, {len(allowed)} cores may be used here",
            hint=f"use --threads {len(allowed)} or fewer",
        )
    return tuple(allowed[:threads])


def cpu_ticks() -> tuple[int, int] | None:
    """CPU time stolen by the hypervisor and in all since boot, in ticks (proc(5), /proc/stat)."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user_to_steal = [int(word) for word in path.read_text().split("\n")[0].split()[1:9]]
    return user_to_steal[7], sum(user_to_steal)


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Share of CPU time stolen between two readings; None where it is not told."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def notes(environment: Environment, steal: float | None) -> list[str]:
    """What about the machine makes times noisy, one sentence each."""
    found = []
    if environment.load_average > environment.cores * BUSY:
        found.append(
            f"the machine was busy before the run: load average "
            f"{environment.load_average:.2g} on {environment.cores} cores"
        )
    if steal and steal > STOLEN:
        found.append(f"the hypervisor took {steal:.1%} of the CPU time during the run")
    return found
