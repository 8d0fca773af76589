"""An interrupt that cannot get lost: libraries swallow KeyboardInterrupt, above all at import."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False
_holding = False


def listen() -> None:
    """From now on remember SIGINT and SIGTERM, and raise KeyboardInterrupt for each."""
    global _asked  # noqa: PLW0603 - a signal belongs to the process
    _asked = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _remember)


def asked() -> bool:
    """Whether the user asked to stop, even if no code saw it."""
    return _asked


def check() -> None:
    """Raise KeyboardInterrupt if the user asked to stop: between steps, and before publishing."""
    if _asked and not _holding:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Finish what belongs together first: an interrupt in the block is raised at its end."""
    global _holding  # noqa: PLW0603 - a signal belongs to the process
    _holding = True
    try:
        yield
    finally:
        _holding = False
    check()


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603 - a signal belongs to the process
    del number, frame
    _asked = True
    check()
