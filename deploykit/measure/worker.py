"""The process of one candidate: `python -m deploykit.measure.worker`.

It reads requests from stdin and answers on a private copy of stdout; fd 1 then points to stderr, so
that what libraries print cannot end up between answers. It ends when stdin does.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import perf_counter_ns
from typing import BinaryIO

from deploykit import gpu
from deploykit.backends import open_session
from deploykit.errors import DeploykitError
from deploykit.measure import feeds
from deploykit.measure.layers import located
from deploykit.measure.meters import Meters
from deploykit.measure.protocol import (
    REQUEST,
    Drive,
    Failed,
    Finish,
    Finished,
    Open,
    Opened,
    Request,
    Time,
    Timed,
    Warmed,
    WarmUp,
)
from deploykit.measure.timing import Calls, ImportClock, time_block, warm_up, yardstick
from deploykit.session import Session
from deploykit.values import Array, Artifact, Feed, Placement, SessionOptions, Value

NOT_TOLD = Placement(provider="unknown", precisions={})
Opener = Callable[[Artifact, str, SessionOptions], Session]

COMPARED_BYTES, COMPARED_NS = 4 << 20, 2_000_000_000
"""Outputs are compared on as many feeds as fit in this size and time, at least on one."""


class Worker:
    """One candidate: its session, and the calls to time."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._meters = Meters()
        self._artifact: Artifact
        self._session: Session
        self._calls: Calls
        self._compared: Sequence[Feed]
        """The first feeds of the pool: those whose outputs are compared."""

    def answer(self, request: Request) -> Value:
        """Do what is asked."""
        match request:
            case Open():
                return self._open(request)
            case WarmUp():
                return self._warm_up(request)
            case Time():
                return self._time(request)
            case Drive():
                from deploykit.measure.loadgen import drive

                return drive(self._calls, request)
            case Finish():
                return self._finish(request)

    def _time(self, request: Time) -> Timed:
        timed = time_block(
            self._calls, request.start, request.budget_ns, perf_counter_ns, self._meters.start
        )
        return Timed(calls_ns=timed, energy_uj=self._meters.stop())

    def _open(self, request: Open) -> Opened:
        affinity, self._artifact = _pin(request.affinity), request.artifact
        pool = feeds.read(request.feeds)
        yardstick_ns = yardstick(perf_counter_ns)
        device_before = gpu.used_bytes()
        began = perf_counter_ns()
        with ImportClock(perf_counter_ns) as imports:
            self._session = self._opener(request.artifact, request.backend, request.options)
        load_ns = perf_counter_ns() - began - imports.total_ns
        first_run_ns, outputs = _first_outputs(self._session, pool)
        feeds.write(request.outputs, outputs)
        self._compared = pool[: len(outputs)]
        self._calls = [self._session.prepare(feed) for feed in pool]
        return Opened(
            load_ns=load_ns,
            first_run_ns=first_run_ns,
            yardstick_ns=yardstick_ns,
            affinity=affinity,
            device_bytes=_more(device_before, gpu.used_bytes()),
        )

    def _warm_up(self, request: WarmUp) -> Warmed:
        warmed = warm_up(self._calls, request, perf_counter_ns)
        gc.collect()
        gc.freeze()
        return warmed

    def _finish(self, request: Finish) -> Finished:
        peak = peak_rss_bytes()  # before `placement`, which may load the model again
        feeds.write(request.outputs, [self._session.run(feed) for feed in self._compared])
        if not request.profile_runs:
            return Finished(placement=NOT_TOLD, peak_rss_bytes=peak)
        first = self._compared[0]
        return Finished(
            placement=self._session.placement(first),
            kernels=located(self._session.kernels(first, request.profile_runs), self._artifact),
            peak_rss_bytes=peak,
        )


def _first_outputs(session: Session, pool: Sequence[Feed]) -> tuple[int, list[dict[str, Array]]]:
    """Nanoseconds of the first run, and the outputs of the first feeds."""
    began = perf_counter_ns()
    outputs = [session.run(pool[0])]
    first_run_ns = perf_counter_ns() - began
    size = sum(array.nbytes for array in outputs[0].values())
    for feed in pool[1:]:
        late = perf_counter_ns() - began > COMPARED_NS
        if late or (len(outputs) + 1) * size > COMPARED_BYTES:
            break
        outputs.append(session.run(feed))
    return first_run_ns, outputs


def _more(before: int | None, after: int | None) -> int | None:
    """By how much; None where either is not told."""
    return None if before is None or after is None else max(0, after - before)


def _pin(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Stay on these cores; returns what the system made of it, empty where it cannot be set."""
    if not hasattr(os, "sched_setaffinity") or not cores:
        return ()
    os.sched_setaffinity(0, cores)
    return tuple(sorted(os.sched_getaffinity(0)))


def peak_rss_bytes() -> int:
    """The largest resident size that this process had.

    On Linux from /proc/self/status: what getrusage tells there includes the parent's peak from
    before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(opener: Opener = open_session) -> None:
    """Answer requests until stdin ends; that ends the process even in the middle of a call."""
    requests_in, answers_out = _private_pipes()
    requests: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(requests_in, requests), daemon=True).start()
    worker = Worker(opener)
    while True:
        answer = _guarded(worker, requests.get())
        answers_out.write(answer.model_dump_json().encode() + b"\n")
        answers_out.flush()


def _guarded(worker: Worker, line: bytes) -> Value:
    """The answer to a request, or why there is none."""
    try:
        return worker.answer(REQUEST.validate_json(line))
    except DeploykitError as error:
        return Failed(failed=str(error))
    except Exception as error:  # noqa: BLE001 - the runtimes' exceptions share no base
        lines = str(error).strip().splitlines() or [""]
        return Failed(failed=f"{type(error).__name__}: {lines[0]}")


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    requests_in, answers_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests_in, answers_out


def _listen(requests_in: BinaryIO, requests: SimpleQueue[bytes]) -> None:
    for line in requests_in:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
