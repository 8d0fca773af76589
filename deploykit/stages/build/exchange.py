"""What the building process is asked, and what it answers: one JSON line each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from deploykit.stages.build.options import BuildOptions
from deploykit.stages.build.profiles import Profile
from deploykit.values import Json, Precision, Value


class Request(Value):
    """One engine to build."""

    onnx: Path
    plan: Path
    """Where the engine goes."""
    module: Literal["tensorrt", "tensorrt_rtx"]
    precision: Precision
    """What the work must be in."""
    options: BuildOptions
    profiles: tuple[Profile, ...]


class Answer(Value):
    """How far it is, what it found out, or which error ended it."""

    phase: str = ""
    done: int = 0
    total: int = 0
    facts: Json | None = None
    error: str = ""
    """Class in `deploykit.errors`; with `fact` and `hint`."""
    fact: str = ""
    hint: str = ""
