"""TensorRT engines: native code, bound to a version and a kind of GPU; never opened unrecorded."""

from __future__ import annotations

from pathlib import Path

from deploykit import store
from deploykit.errors import InputError
from deploykit.values import Artifact


def open_file(path: Path) -> Artifact:
    """The artifact of an engine, by its record. Raises InputError: it has none."""
    if artifact := store.read(path):
        return artifact
    raise InputError(
        f"{path}: an engine without a record; it is native code that must not be loaded on trust",
        hint="build it with deploykit, which writes the record beside it",
    )
