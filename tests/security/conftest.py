"""A command that must be refused, and the proof that nothing at any final path changed."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from deploykit import _files
from deploykit.values import Artifact
from tests.bundle.conftest import data, linear, sound
from tests.cli.conftest import Command, deploykit
from tests.security.small import Place

__all__ = ["data", "deploykit", "linear", "sound"]
OLD = "what lies at the final path from before"


class Case(NamedTuple):
    """A bad input: the row of SECURITY.md, how to ask, and what must be told."""

    row: int
    name: str
    words: Callable[[Place], tuple[object, ...]]
    code: int
    fact: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.row}-{self.name.replace(' ', '-')}"


@pytest.fixture
def place(tmp_path: Path, sound: Path, linear: Artifact) -> Place:
    """A folder for the bad input, and results that are there already."""
    made = Place(tmp_path, linear.path, sound)
    made.out.parent.mkdir()
    made.out.write_text(OLD)
    return made


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every entry below a folder: kind, mode, content."""
    return {str(path.relative_to(folder)): _entry(path) for path in folder.rglob("*")}


def _entry(path: Path) -> tuple[object, ...]:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return mode, path.readlink()
    return mode, _files.sha256(path) if stat.S_ISREG(mode) else ""


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Nothing below the folder is other than it was, and nothing came."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


@pytest.fixture
def refuses(place: Place, deploykit: Command) -> Callable[[Case], None]:
    """The command of a case ends as it says, and nothing changed."""

    def check(case: Case) -> None:
        words = case.words(place)
        with unchanged(place.folder):
            told = deploykit(*words)
        assert told.code == case.code, told.err
        fact, fix = told.err.splitlines()
        assert fact.startswith("   no: " if case.code == 7 else "error: ")
        assert case.fact in fact
        assert case.fix in fix

    return check
