"""A terminal that shows how far a command is, on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deploykit import _interrupt

console = Console(stderr=True, highlight=False)


class Terminal:
    """An Observer: one line a finished step, a moving bar for the step that runs."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._label, self._began = "", time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clear()
        self._bar.stop()

    def step(self, name: str, what: str) -> None:
        """Begin a step."""
        _interrupt.check()
        self._clear()
        self._label, self._began = f"{name}: {what}", time.monotonic()
        self._task = self._bar.add_task(self._label, total=None, text="")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Move the bar; stop here if an interrupt was swallowed on the way."""
        _interrupt.check()
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)

    def done(self, text: str, *, cached: bool) -> None:
        """End the step with one line."""
        self._clear()
        spent = "kept" if cached else f"{time.monotonic() - self._began:.1f} s"
        mark = "·" if cached else "✓"
        console.print(f"{mark} {self._label:<44} {spent:>8}  {text}", markup=False, soft_wrap=True)

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
