"""A worker whose sessions behave as their backend's name says: `fake:BEHAVIOUR[:MILLISECONDS]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import count
from time import perf_counter_ns, sleep
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit.errors import MissingError
from deploykit.measure.worker import main
from deploykit.values import Artifact, Placement, SessionOptions


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
        match self.behaviour:
            case "negated":
                return {"y": -x}
            case "nan":
                return {"y": x * np.nan}
            case "renamed":
                return {"z": x}
            case "cut":
                return {"y": x[:, 1:]}
            case "forgetful":
                return {"y": x * (1 if next(self.runs) < 8 else 2)}
            case "rounded":
                return {"y": x.round()}
        return {"y": x * 2}

    def prepare(self, feed: Mapping[str, Any]) -> Callable[[], object]:
        return self.call

    def call(self) -> None:
        number = next(self.calls)
        match self.behaviour:
            case "crash" if number == 20:
                print("about to crash", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit" if number == 20:
                os._exit(3)
            case "hang" if number == 20:
                sleep(1e6)
            case "raise" if number == 20:
                raise ArithmeticError("no luck\nsecond line")
            case "talk":
                print('{"calls_ns": [1]}', flush=True)
                os.write(1, b"native chatter\n")
            case "drift":
                self.milliseconds *= 1.03
            case "stall" if number % 50 == 49:
                sleep(0.05)
        spin(self.milliseconds)

    def placement(self, feed: Mapping[str, Any]) -> Placement:
        if self.behaviour == "hungry":
            np.ones(50_000_000)  # 400 MB that must not count
        return Placement(provider="fake", precisions={"fp32": 1})

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
        time.sleep(0.3)
    if behaviour == "never-load":
        time.sleep(1e6)
    return FakeSession(artifact, behaviour, float(milliseconds[0]) if milliseconds else 0.2)


if __name__ == "__main__":
    main(fake_open)
