"""The machine under a benchmark: its cores, its load, and what its hypervisor takes."""

from __future__ import annotations

import os
from pathlib import Path
from time import sleep

from deploykit.environment import Environment
from deploykit.errors import UsageError

LOOK_SECONDS = 0.25
"""How long cores are watched before some are chosen."""
BUSY, STOLEN, OTHERS = 0.5, 0.01, 0.1
"""Worth a note: cores in use before a run, CPU time stolen, and taken by others during it."""
LITTLE_MEMORY = 0.1
"""Worth a note: share of the memory that is free."""


def choose_cores(threads: int) -> tuple[int, ...]:
    """The `threads` quietest cores that this process may use; empty where that cannot be told.

    Of cores as quiet as each other, one whose sibling is not taken comes first, and the first core
    last, since it serves most interrupts. Raises UsageError: there are fewer.
    """
    allowed = usable_cores()
    if not allowed:
        return ()
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


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may use; empty where that cannot be told."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


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


def own_ticks() -> float:
    """CPU time of this process and its children that have ended, in ticks."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own * os.sysconf("SC_CLK_TCK")


def others_share(
    before: tuple[int, int] | None, after: tuple[int, int] | None, own: float
) -> float | None:
    """Share of the machine's CPU time that other processes took between two `busy_ticks`."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return max(0.0, (after[0] - before[0] - own) / (after[1] - before[1]))


def busy_ticks() -> tuple[int, int] | None:
    """CPU time of all processes, and in all, in ticks since boot."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(word) for word in path.read_text().split("\n")[0].split()[1:9]]
    user, nice, system, *_, softirq, _ = ticks
    return user + nice + system + softirq, sum(ticks)


def notes(environment: Environment, steal: float | None, others: float | None) -> list[str]:
    """What about the machine makes times noisy, one sentence each."""
    found = _standing(environment)
    if others and others > OTHERS:
        found.append(f"other processes took {others:.0%} of the machine's CPU time during the run")
    if environment.load_average > environment.cores * BUSY:
        found.append(
            f"the machine was busy before the run: load average "
            f"{environment.load_average:.2g} on {environment.cores} cores"
        )
    if steal and steal > STOLEN:
        found.append(f"the hypervisor took {steal:.1%} of the CPU time during the run")
    return found


def _standing(environment: Environment) -> list[str]:
    """What the machine is set to, or short of."""
    found = []
    if environment.governor not in (None, "performance"):
        found.append(f"the CPU's frequency governor is {environment.governor!r}, not 'performance'")
    quota, cores = environment.cpu_quota, environment.cores
    if quota is not None and quota < cores:
        found.append(f"the container may use {quota:g} of {cores} cores: it is throttled beyond")
    free, whole = environment.memory_available_bytes, environment.memory_bytes
    if free is not None and free < LITTLE_MEMORY * whole:
        found.append(f"little memory is free: {free / 2**30:.1f} of {whole / 2**30:.1f} GiB")
    return found
