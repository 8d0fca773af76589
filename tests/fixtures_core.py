"""What several tests of the lower rooms share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from deploykit.errors import DeploykitError, InputError
from deploykit.store import digest

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@contextmanager
def refused(kind: type[DeploykitError], *facts: object, hint: str) -> Iterator[None]:
    """The block raises exactly `kind`; its two lines hold the facts and the way out."""
    with pytest.raises(DeploykitError) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    for fact in facts:
        assert str(fact) in str(error)
    assert hint in error.hint


@contextmanager
def fine_or_refused(fact: object) -> Iterator[None]:
    """The block works, or raises InputError with this fact: nothing else."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    assert error is None or (str(fact) in str(error) and error.hint)


def content(folder: Path) -> dict[str, str]:
    """Digest of each file and folder that lies in a folder, by name."""
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def python(code: str, *arguments: object, wait: bool = True) -> subprocess.Popen[str]:
    """Run code in another Python, by default until it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        process.wait(60)
    return process


def told(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process wrote, to its end."""
    with process:
        return process.communicate(timeout=60)
