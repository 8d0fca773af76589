"""Rows 15 and 16 of SECURITY.md: data from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.security.conftest import Case
from tests.security.small import Place, Words, quantize


def arrays(**content: np.ndarray[Any, Any]) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        np.savez(place.folder / "d.npz", **content)
        return quantize(place, place.linear, place.folder / "d.npz")

    return words


def text(content: bytes) -> Callable[[Place], Words]:
    return lambda place: quantize(place, place.linear, place.written("d.npz", content))


def overlapping(place: Place) -> Words:
    """A recipe whose evaluation data holds one calibration sample."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3)).astype(np.float32)
    labels = np.arange(20) % 4
    np.savez(place.folder / "c.npz", x=x[:20], target=labels)
    np.savez(place.folder / "e.npz", x=x[19:39], target=labels)
    recipe = f'name = "r"\n[model]\npath = "{place.linear}"\n[data]\n'
    recipe += f'calibration = "{place.folder / "c.npz"}"\n'
    recipe += f'evaluation = "{place.folder / "e.npz"}"\n'
    return ("run", place.written("r.toml", recipe), "-o", place.folder / "run")


GOOD = np.ones((8, 3), np.float32)
CASES = [
    Case(15, "empty", arrays(x=GOOD[:0]), 3, "empty"),
    Case(15, "one constant sample", arrays(x=GOOD[:1]), 3, "x", "constant input"),
    Case(15, "zeros", arrays(x=GOOD * 0), 3, "7 of 8 samples", ""),
    Case(15, "nan", arrays(x=GOOD * np.float32("nan")), 3, "NaN"),
    Case(15, "wrong shape", arrays(x=np.ones((8, 5), np.float32)), 3, "5"),
    Case(15, "wrong dtype", arrays(x=np.ones((8, 3), np.int64)), 3, "int64"),
    Case(15, "wrong name", arrays(y=GOOD), 3, "no array for the model input 'x'"),
    Case(15, "objects", arrays(x=np.array([{}, {}], object)), 3, "not a readable .npz"),
    Case(15, "no archive", text(b"PK\x03\x04 torn"), 3, "not a readable .npz"),
    Case(16, "overlap", overlapping, 3, "1 of 20 evaluation samples are in the calibration data"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data(case: Case, refuses: Callable[[Case], None]) -> None:
    refuses(case)
