"""A build in a process of its own: native code may crash there, and a Ctrl-C really ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from deploykit import errors
from deploykit.errors import DeploykitError, ResourceError, StageError
from deploykit.stages.build.exchange import Answer, Request
from deploykit.values import Json

WORKER = (sys.executable, "-P", "-m", "deploykit.stages.build.worker")
GRACE_SECONDS = 5.0
"""How long a build that is told to stop may take to do so."""
Talk = Callable[[str, int, int], None]
"""Called with the phase, the steps done, and how many there are."""


def run(request: Request, talk: Talk | None = None) -> Json:
    """Build in a child process and return the facts; the plan is then at `request.plan`.

    Whatever ends this function ends the child. Raises the error that ended the build; StageError:
    TensorRT crashed. ResourceError: the system killed it, as it does when memory is short.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": _search_path()},
            start_new_session=True,
        )
        try:
            facts = _follow(process, request, talk)
        finally:
            _end(process)
        if facts is None:
            raise _crashed(process.returncode, stderr, request)
        return facts


def _follow(process: subprocess.Popen[bytes], request: Request, talk: Talk | None) -> Json | None:
    """The facts, or None if the child ended without a word."""
    assert process.stdin is not None  # noqa: S101 - they are pipes
    assert process.stdout is not None  # noqa: S101
    with suppress(BrokenPipeError):  # it has ended: the end of its output says so
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError:
            return None
        if answer.error:
            raise _told(answer)
        if answer.facts is not None:
            process.wait()
            return answer.facts
        if talk:
            talk(answer.phase, answer.done, answer.total)
    process.wait()
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the child to stop, by the end of its input; kill it if it does not."""
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _told(answer: Answer) -> DeploykitError:
    kind: type[DeploykitError] = getattr(errors, answer.error)
    return kind(answer.fact, hint=answer.hint)


def _crashed(code: int, stderr: IO[bytes], request: Request) -> Exception:
    if code == -signal.SIGKILL:
        return ResourceError(
            f"the system killed the build of {request.onnx}, as it does when memory is short",
            hint="build on a machine with more memory, or with fewer profiles and smaller shapes",
        )
    stderr.seek(0)
    words = [w for w in stderr.read().decode(errors="replace").splitlines() if w.strip()]
    last = f": {words[-1].strip()[:200]}" if words else ""
    if code >= 0:  # our own code
        return RuntimeError(f"the building process ended with exit code {code}{last}")
    how = f"signal {-code}, {signal.strsignal(-code)}"
    return StageError(
        f"{request.module.replace('_', '-')} crashed while it built {request.onnx} ({how}{last})",
        hint="try another --optimization-level, another version of it, or smaller shapes",
    )


def _search_path() -> str:
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
