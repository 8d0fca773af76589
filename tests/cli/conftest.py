"""A command run as a user runs it, in a process of its own or in this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from deploykit.cli import _errors, group


class Told(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The error, which is two lines and nothing else."""
        lines = self.err.splitlines()
        assert len(lines) == 2, self.err
        assert lines[0].startswith("error: "), self.err
        assert lines[1].startswith("  fix: "), self.err
        return lines


Command = Callable[..., Told]


@pytest.fixture
def deploykit(capsys: pytest.CaptureFixture[str]) -> Command:
    """Call a command in this process (imports are paid once)."""

    def call(*words: object) -> Told:
        code = _errors.call(group, [str(w) for w in words])
        out, err = capsys.readouterr()
        return Told(code, out, err)

    return call


def spawn(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploykit", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )
