"""One process at a time: the system frees what a killed one held."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploykit import _files, _interrupt
from deploykit.errors import ResourceError, UsageError

LONGEST_WAIT_S = 3600.0
log = logging.getLogger("deploykit")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes of deploykit out of a folder.

    Raises UsageError: one is in it, or it takes no files. ResourceError: the disk is full.
    """
    lock = folder / ".lock"  # a file: NFS locks nothing that cannot be opened for writing
    try:
        descriptor = _tried(lock)
    except OSError as error:
        raise _files.unwritable(folder, error) from error
    if descriptor is None:
        raise UsageError(
            f"{folder} is in use by another run",
            hint="wait for it, or give another output folder",
        )
    with _released(lock, descriptor):
        yield


@contextmanager
def alone(out: Path, wait_s: float | None = None) -> Iterator[None]:
    """Let one process at a time make `out`; others wait for it, at most LONGEST_WAIT_S.

    The lock is a file beside it that is gone at the end; the system frees that of a killed process.
    Raises ResourceError: another process is still at it.
    """
    lock = out.absolute().with_name(f".{out.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock, out, LONGEST_WAIT_S if wait_s is None else wait_s)
    except OSError as error:
        raise _files.unwritable(out, error) from error
    with _released(lock, descriptor):
        yield


@contextmanager
def _released(lock: Path, descriptor: int) -> Iterator[None]:
    """At the end the lock is gone, and free."""
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _tried(lock: Path) -> int | None:
    """A descriptor that holds the lock; None where another process does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has just removed it


def _locked(lock: Path, out: Path, wait_s: float) -> int:
    """A descriptor that holds the lock. Raises ResourceError: not within the time."""
    started, told = time.monotonic(), False
    while (descriptor := _tried(lock)) is None:
        holder = _holder(lock)
        if time.monotonic() - started > wait_s:
            raise ResourceError(
                f"{out} is being made by process {holder}, which was not done in {wait_s:g} s",
                hint="wait for it or end it, or give another output path",
            )
        if not told:
            log.warning("%s is being made by process %s: waiting for it", out, holder)
            told = True
        time.sleep(0.05)
        _interrupt.check()
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _holder(lock: Path) -> str:
    """The number of the process that holds the lock, as that process sees it."""
    with suppress(OSError):
        return lock.read_text(errors="replace")[:20] or "another"
    return "another"


def _is(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that lies at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
