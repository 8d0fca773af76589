"""An interrupt that cannot get lost: libraries swallow KeyboardInterrupt, above all at import."""

from __future__ import annotations

import signal
from types import FrameType

_asked = False


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
    if _asked:
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603 - a signal belongs to the process
    del number, frame
    _asked = True
    raise KeyboardInterrupt
