"""A worker process as the benchmark sees it: asked, waited for so long, ended in any case."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from pydantic import ValidationError

from deploykit.session import Closing
from deploykit.values import V, Value

# -P: the folder that one happens to be in is no place to import from; PYTHONPATH below says it all.
WORKER = (sys.executable, "-P", "-m", "deploykit.measure.worker")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ChildError(Exception):
    """A worker gave no answer; the text says why."""


class Child(Closing):
    """One worker process, in a process group of its own that is killed on leaving the context."""

    def __init__(self, command: Sequence[str], folder: Path, threads: int) -> None:
        """Start it; `folder` is for its stderr."""
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env=_environment(threads),
                start_new_session=True,
            )
        assert self._process.stdin is not None  # noqa: S101 - they are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)

    @property
    def pid(self) -> int:
        """Of the process and of its group."""
        return self._process.pid

    def ask(self, request: Value, kind: type[V], seconds: float) -> V:
        """Send a request and wait for its answer.

        Raises ChildError: the worker said no, crashed, answered nonsense, or nothing in time.
        """
        line = request.model_dump_json().encode() + b"\n"
        answer = self._exchange(line, seconds)
        try:
            data = json.loads(answer)
            if "failed" in data:
                raise ChildError(str(data["failed"]))
            return kind.model_validate(data)
        except (ValueError, TypeError, ValidationError) as error:
            raise ChildError(f"answered with no {kind.__name__}: {answer[:80]!r}") from error

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        deadline = monotonic() + seconds
        waiting, answer = line, b""
        while not answer.endswith(b"\n"):
            to_write = [self._in] if waiting else []
            left = max(0.0, deadline - monotonic())
            readable, writable, _ = select.select([self._out], to_write, [], left)
            if monotonic() > deadline or not (readable or writable):
                raise ChildError(f"no answer in {round(seconds, 1):g} s")
            if writable:
                waiting = self._write(waiting)
            if readable:
                part = os.read(self._out, 1 << 20)
                if not part:
                    raise ChildError(self._end())
                answer += part
        return answer

    def _write(self, waiting: bytes) -> bytes:
        """Write what the pipe takes; returns the rest."""
        try:
            return waiting[os.write(self._in, waiting) :]
        except BrokenPipeError:
            return b""  # it has ended: the end of its output says so

    def _end(self) -> str:
        """How the process ended, and its last words."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {-code} ({signal.strsignal(-code)})"
        words = self._stderr.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(words) if line.strip()), "")
        return f"the process ended with {how}" + (f": {last[:200]}" if last else "")

    def close(self) -> None:
        """Kill the process with its group, and wait for it; nothing if it has ended."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def _environment(threads: int) -> dict[str, str]:
    """This process's, with the thread variables set, and its module search path."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    limits = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**os.environ, **limits, "PYTHONPATH": path}
