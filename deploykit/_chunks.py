"""Chunks of samples on their way from files to batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deploykit.errors import InputError
from deploykit.values import Array

Chunk = dict[str, Array]
"""Arrays of equal length by name; `target` among them where there are labels."""


def rebatched(chunks: Iterator[Chunk], size: int) -> Iterator[Chunk]:
    """Cut and join chunks into batches of `size` samples; the last may be smaller."""
    waiting: list[Chunk] = []
    count = 0
    for chunk in chunks:
        waiting.append(chunk)
        count += len(next(iter(chunk.values())))
        if count >= size:
            whole = _joined(waiting)
            full = count - count % size
            for start in range(0, full, size):
                yield {name: array[start : start + size] for name, array in whole.items()}
            count -= full
            waiting = [{name: array[full:] for name, array in whole.items()}] if count else []
    if count:
        yield _joined(waiting)


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}


def alike(chunks: Iterator[Chunk], reference: str) -> Iterator[Chunk]:
    """The chunks as they are. Raises InputError: samples differ in names, dtypes or shapes."""
    first: dict[str, str] = {}
    for chunk in chunks:
        kinds = {name: f"{a.dtype}{list(a.shape[1:])}" for name, a in chunk.items()}
        first = first or kinds
        if kinds != first:
            raise InputError(
                f"{reference}: samples differ in names, dtypes or shapes: {first} and {kinds}",
                hint="give every sample the same arrays of the same dtype and shape: pad those of "
                "another length as the model's users do, or keep one data set for each length",
            )
        yield chunk
