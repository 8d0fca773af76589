"""A worker whose sessions behave as their backend's name says: `fake:BEHAVIOUR[:MILLISECONDS]`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from time import perf_counter_ns, sleep
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit.errors import MissingError
from deploykit.measure.worker import main
from deploykit.values import Artifact, Kernel, Placement, SessionOptions


def spin(milliseconds: float) -> None:
    end = perf_counter_ns() + milliseconds * 1e6
    while perf_counter_ns() < end:
        pass


class FakeSession:
    def __init__(self, artifact: Artifact, behaviour: str, milliseconds: float) -> None:
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self.behaviour, self.milliseconds = behaviour, milliseconds
        self.calls = count()
        self.runs = count()

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
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
        return self.call

    def call(self) -> None:
        number = next(self.calls)
        match self.behaviour:
            case "crash" if number == 20:
                sys.stderr.write("about to crash\n")
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit" if number == 20:
                os._exit(3)
            case "hang" if number == 20:
                sleep(1e6)
            case "raise" if number == 20:
                raise ArithmeticError("no luck\nsecond line")
            case "talk":
                sys.stdout.write('{"calls_ns": [1]}\n')
                sys.stdout.flush()
                sys.stdout.flush()
                os.write(1, b"native chatter\n")
            case "stall" if number % 50 == 49:
                sleep(0.05)
        spin(self.milliseconds)

    def placement(self, feed: Mapping[str, Any]) -> Placement:
        if self.behaviour == "hungry":
            np.ones(50_000_000)  # 400 MB that must not count
        precision = {"halved": "fp16", "brain": "bf16"}.get(self.behaviour, "fp32")
        return Placement(provider="fake", precisions={precision: 1})

    def kernels(self, feed: Mapping[str, Any], runs: int) -> tuple[Kernel, ...]:
        share = {"fallen": 0.4, "leaning": 0.8}.get(self.behaviour, 1)
        return tuple(
            Kernel(names=(), operator="Work", microseconds=time, precision="fp32", provider=where)
            for where, time in (("fake", share), ("cpu", 1 - share))
            if time
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


def fake_open(artifact: Artifact, backend: str, options: SessionOptions) -> FakeSession:
    _, behaviour, *milliseconds = backend.split(":")
    if behaviour == "missing":
        raise MissingError("fakert cannot run here: it is not installed", hint="install it")
    if behaviour == "slow-load":
        sleep(0.3)
    return FakeSession(artifact, behaviour, float(milliseconds[0]) if milliseconds else 0.2)


if __name__ == "__main__":
    main(fake_open)
