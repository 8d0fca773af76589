"""Read an `.npz` a few rows at a time, whatever its size."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from deploykit.errors import InputError
from deploykit.values import Array

CHUNK_BYTES = 1 << 25
"""How much is in memory at a time, one row at least."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an array is, before its values are read."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def headers(path: Path) -> dict[str, Header]:
    """The arrays of the archive by name. Raises InputError: it is none, or holds pickles."""
    with _told(path), zipfile.ZipFile(path) as archive:
        found = {}
        for name in archive.namelist():
            with archive.open(name) as file:
                found[name.removesuffix(".npy")] = _header(file)
        return found


def chunks(path: Path) -> Iterator[dict[str, Array]]:
    """The arrays, some rows of each at a time. Raises InputError: it is torn or no `.npz`."""
    kinds = headers(path)
    rows = min((kind.shape[0] for kind in kinds.values() if kind.shape), default=0)
    total = sum(kind.row_bytes for kind in kinds.values())
    step = max(CHUNK_BYTES // max(total, 1), 1)
    if any(kind.fortran for kind in kinds.values()):
        step = max(rows, 1)  # their rows do not lie together
    with ExitStack() as stack:
        with _told(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            files = {
                name: stack.enter_context(archive.open(_member(archive, name))) for name in kinds
            }
            for file in files.values():
                _header(file)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            with _told(path):
                chunk = {name: _rows(files[name], kind, count) for name, kind in kinds.items()}
            yield chunk
        with _told(path):
            for name, file in files.items():
                if file.read(1):  # reading to the end also checks the sum of each member
                    raise ValueError(f"{name} has more values than its header says")


def _member(archive: zipfile.ZipFile, name: str) -> str:
    return f"{name}.npy" if f"{name}.npy" in archive.namelist() else name


def _header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"an array of format {version}")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return Header(shape, dtype, fortran and len(shape) > 1)


def _rows(file: IO[bytes], kind: Header, count: int) -> Array:
    size = count * kind.row_bytes
    data = bytearray(file.read(size))
    if len(data) < size:
        raise ValueError(f"{len(data)} of {size} bytes")
    order: Literal["F", "C"] = "F" if kind.fortran else "C"
    return np.frombuffer(data, kind.dtype).reshape((count, *kind.shape[1:]), order=order)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn whatever a damaged archive raises into one error."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zlib's and the header parser's errors among them
        raise InputError(
            f"{path}: not a readable .npz of plain arrays: {error}",
            hint="write it with numpy.savez; pickled objects are refused",
        ) from error
