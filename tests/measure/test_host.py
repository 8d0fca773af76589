from __future__ import annotations

import os

import pytest

from deploykit import environment
from deploykit.errors import UsageError
from deploykit.measure import host


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores, 0 and 1 of one physical core; returns how busy each is."""
    busy = dict.fromkeys(range(4), 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(busy))
    monkeypatch.setattr(host, "busy_shares", lambda seconds: busy)
    monkeypatch.setattr(host, "siblings", lambda core: {core ^ 1, core})
    return busy


def test_the_first_core_is_the_last_choice(machine):
    assert host.choose_cores(1) == (1,)
    assert host.choose_cores(4) == (0, 1, 2, 3)


def test_threads_go_to_cores_that_share_nothing(machine):
    assert host.choose_cores(2) == (1, 2)


def test_a_busy_core_is_left_alone(machine):
    machine.update({1: 0.9, 2: 0.5})
    assert host.choose_cores(1) == (3,)
    machine.update({0: 0.04, 3: 0.0})  # as quiet, by the resolution of a short look
    assert host.choose_cores(2) == (0, 3)


def test_more_threads_than_cores_are_refused(machine):
    with pytest.raises(UsageError, match="5 threads asked for, 4 cores"):
        host.choose_cores(5)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc/stat")  # noqa: PTH110
def test_a_core_that_works_is_seen_to_work():
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        first = host._core_ticks()[core]
        deadline = os.times().elapsed + 0.3
        while os.times().elapsed < deadline:
            pass
        last = host._core_ticks()[core]
    finally:
        os.sched_setaffinity(0, before)
    assert last[0] - first[0] < 0.2 * (last[1] - first[1])  # idle ticks
    assert core in host.siblings(core)


def test_what_disturbs_is_named():
    quiet = environment.read().model_copy(
        update={
            "load_average": 0.0, "governor": "performance", "cpu_quota": None, "cores": 4,
            "memory_available_bytes": 8 << 30, "memory_bytes": 16 << 30, "gpus": (),
        }
    )  # fmt: skip
    assert host.notes(quiet, 0.0, 0.0) == []
    loud = quiet.model_copy(
        update={"load_average": 3.0, "governor": "powersave", "cpu_quota": 1.5,
                "memory_available_bytes": 1 << 30}
    )  # fmt: skip
    told = " | ".join(host.notes(loud, 0.05, 0.4))
    for words in (
        "governor is 'powersave'", "1.5 of 4 cores", "1.0 of 16.0 GiB", "processes took 40%",
        "load average 3", "hypervisor took 5.0%",
    ):  # fmt: skip
        assert words in told
