"""The machine under a benchmark: its cores, its load, and what its hypervisor takes."""

from __future__ import annotations

import os
from pathlib import Path
from time import sleep

from deploykit.environment import Environment
from deploykit.errors import UsageError

LOOK_SECONDS = 0.25
"""How long cores are watched before some are chosen."""
BUSY, STOLEN = 0.5, 0.01
"""Shares of the cores in use before a run, and of CPU time stolen during it, worth a note."""


def choose_cores(threads: int) -> tuple[int, ...]:
    """The `threads` quietest cores that this process may use; empty where that cannot be told.

    Of cores as quiet as each other, one whose sibling is not taken comes first, and the first core
    last, since it serves most interrupts. Raises UsageError: there are fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise UsageError(
            f"{threads} threads asked for, {len(allowed)} cores may be used here",
            hint=f"use --threads {len(allowed)} or fewer",
        )
    busy, taken = busy_shares(LOOK_SECONDS), set[int]()
    chosen: list[int] = []
    for _ in range(threads):
        left = [core for core in allowed if core not in chosen]
        best = min(left, key=lambda c: (round(busy.get(c, 0.0), 1), c in taken, c == 0, c))
        chosen.append(best)
        taken |= siblings(best)
    return tuple(sorted(chosen))


def busy_shares(seconds: float) -> dict[int, float]:
    """Share of each core's time, 0..1, that was not idle over so long; empty if not told."""
    before = _core_ticks()
    sleep(seconds)
    found = {}
    for core, (idle, whole) in _core_ticks().items():
        past = before.get(core, (0, 0))
        found[core] = 1 - (idle - past[0]) / max(1, whole - past[1])
    return found


def siblings(core: int) -> set[int]:
    """The logical cores of one physical core, itself among them."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    if not path.exists():
        return {core}
    found: set[int] = set()
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _core_ticks() -> dict[int, tuple[int, int]]:
    """Idle ticks, waiting for I/O among them, and all ticks of each core (proc(5), /proc/stat)."""
    path = Path("/proc/stat")
    lines = path.read_text().split("\n") if path.exists() else []
    found = {}
    for line in lines:
        name, *words = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdigit():
            ticks = [int(word) for word in words[:8]]
            found[int(name[3:])] = ticks[3] + ticks[4], sum(ticks)
    return found


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
