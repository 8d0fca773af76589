"""A worker of known behaviour, to hold the bench against the truth; no model is run.

The backend's name says what it does: `fake:BEHAVIOUR[:MILLISECONDS]`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from threading import Event
from time import perf_counter_ns, sleep
from typing import Any

import numpy as np

from deploykit.errors import MissingError
from deploykit.measure.worker import main
from deploykit.session import Closing
from deploykit.values import Artifact, Kernel, Placement, SessionOptions

WORKER = (sys.executable, "-P", "-m", "deploykit.measure.fake_worker")
STALL_CALLS, STALL_MS = 50, 50
"""One call of so many takes so much longer."""
SLOW_OF_FIVE, SLOWER = 2, 3
"""Of five calls of `bimodal`, so many take so many times as long."""
LATE_CALL = 300
"""The call at which `late-crash` and `late-hang` do: not while they are timed, in a short run."""
DOUBLED_NS = 700_000_000
"""A call of `drift` takes twice as long each time that so much time has passed."""


def spin(milliseconds: float) -> None:
    """Be busy for so long."""
    end = perf_counter_ns() + milliseconds * 1e6
    while perf_counter_ns() < end:
        pass


class FakeSession(Closing):
    """A session that computes nothing, and takes its time for it."""

    def __init__(self, artifact: Artifact, behaviour: str, milliseconds: float) -> None:
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self.behaviour, self.milliseconds = behaviour, milliseconds
        self.began: int | None = None
        self.calls = count()
        self.runs = count()

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """`y` is twice `x`; not so for the behaviours that are wrong."""
        x = np.asarray(feed["x"], np.float32)
        made = {
            "negated": {"y": -x},
            "nan": {"y": x * np.nan},
            "renamed": {"z": x},
            "cut": {"y": x[:, 1:]},
            "forgetful": {"y": x * (1 if next(self.runs) < 8 else 2)},
            "rounded": {"y": x.round()},
        }
        return made.get(self.behaviour, {"y": x * 2})

    def prepare(self, feed: Mapping[str, Any]) -> Callable[[], object]:
        """One call is as good as another."""
        del feed
        return self.call

    def call(self) -> None:
        """Be busy for the time that the behaviour gives this call, or come to an end."""
        number = next(self.calls)
        self.began = self.began or perf_counter_ns()
        if number == 20:
            self._fate()
        if number == LATE_CALL:
            self._late_fate()
        if self.behaviour == "stall" and number % STALL_CALLS == STALL_CALLS - 1:
            sleep(STALL_MS / 1e3)
        if self.behaviour == "talk":
            sys.stdout.write('{"calls_ns": [1]}\n')
            sys.stdout.flush()
            os.write(1, b"native chatter\n")
        spin(self.milliseconds * self._factor(number))

    def _factor(self, number: int) -> float:
        if self.behaviour == "bimodal":
            return SLOWER if number % 5 < SLOW_OF_FIVE else 1
        if self.behaviour == "drift":
            return float(2 ** ((perf_counter_ns() - (self.began or 0)) / DOUBLED_NS))
        return 1

    def _fate(self) -> None:
        match self.behaviour:
            case "crash":
                sys.stderr.write("about to crash\n")
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                sleep(1e6)
            case "lost":
                Event().wait()  # for a completion that nobody tells of
            case "raise":
                raise ArithmeticError("no luck\nsecond line")
            case _:
                pass

    def _late_fate(self) -> None:
        if self.behaviour == "late-crash":
            raise RuntimeError("late")
        if self.behaviour == "late-hang":
            Event().wait()

    def placement(self, feed: Mapping[str, Any]) -> Placement:
        """One node, in the precision of the behaviour."""
        del feed
        if self.behaviour == "hungry":
            np.ones(50_000_000)  # 400 MB that must not count
        precision = {"halved": "fp16", "brain": "bf16"}.get(self.behaviour, "fp32")
        return Placement(provider="fake", precisions={precision: 1})

    def kernels(self, feed: Mapping[str, Any], runs: int) -> tuple[Kernel, ...]:
        """Work in two places, in shares of the behaviour."""
        del feed, runs
        share = {"fallen": 0.4, "leaning": 0.8}.get(self.behaviour, 1)
        return tuple(
            Kernel(names=(), operator="Work", microseconds=time, precision="fp32", provider=where)
            for where, time in (("fake", share), ("cpu", 1 - share))
            if time
        )

    def close(self) -> None:
        """Do nothing: nothing is held."""


def fake_open(artifact: Artifact, backend: str, options: SessionOptions) -> FakeSession:
    """A session of the behaviour that the backend's name says."""
    del options
    _, behaviour, *milliseconds = backend.split(":")
    if behaviour == "missing":
        raise MissingError("fakert cannot run here: it is not installed", hint="install it")
    if behaviour == "slow-load":
        sleep(0.3)
    return FakeSession(artifact, behaviour, float(milliseconds[0]) if milliseconds else 0.2)


if __name__ == "__main__":
    main(fake_open)
