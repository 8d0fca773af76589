"""The pool of feeds: made once, written to one file, read by every worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import _files
from deploykit.dataset import Dataset
from deploykit.errors import InputError, UsageError
from deploykit.measure.result import Candidate
from deploykit.values import Array, Feed, TensorSpec

POOL_FEEDS, POOL_BYTES = 8, 64 << 20
"""Feeds of a pool, and the size that it does not exceed by more than one feed."""


def check_batch_sizes(candidates: Sequence[Candidate], sizes: Sequence[int]) -> None:
    """Refuse a batch size that a model does not take. Raises UsageError."""
    for candidate in candidates:
        for spec in candidate.artifact.inputs:
            fixed = spec.shape[0] if spec.shape else None
            odd = [size for size in sizes if isinstance(fixed, int) and size != fixed]
            if odd:
                raise UsageError(
                    f"{candidate.name}: the batch of {spec} is fixed, asked for {odd[0]}",
                    hint=f"use --batch-sizes {fixed}, or export with a dynamic batch",
                )


def make_pool(
    candidates: Sequence[Candidate], size: int, data: Dataset | None, rng: np.random.Generator
) -> list[Feed]:
    """Up to POOL_FEEDS feeds of `size` samples that every candidate takes.

    Without data the values are random. Raises InputError: the data holds less than one feed, or
    does not fit a model. UsageError: a model's inputs leave more than the batch open.
    """
    inputs = candidates[0].artifact.inputs
    made = _random(inputs, size, rng) if data is None else _real(data.matching(inputs), size)
    pool = _limited(made)
    if not pool:
        raise InputError(
            f"{data.reference if data else 'random'}: less than one batch of {size} samples",
            hint="give more data or smaller --batch-sizes",
        )
    for candidate in candidates:
        _check_fit(candidate, pool[0])
    return pool


def write(path: Path, feeds: Sequence[Feed]) -> None:
    """Write feeds, or outputs, in order to an `.npz`.

    Raises ResourceError: the disk is full. InputError: an array holds objects (strings).
    """
    arrays: dict[str, Any] = {
        f"{i}/{name}": array for i, feed in enumerate(feeds) for name, array in feed.items()
    }
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise InputError(
                f"{name.split('/', 1)[1]!r} is no array of numbers",
                hint="bench models whose inputs and outputs are numbers",
            )
    with _files.staged(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read(path: Path) -> list[dict[str, Array]]:
    """Feeds that `write` wrote, in order."""
    feeds: list[dict[str, Array]] = []
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            index, name = key.split("/", 1)
            if int(index) == len(feeds):
                feeds.append({})
            feeds[int(index)][name] = arrays[key]
    return feeds


def _limited(feeds: Iterable[Feed]) -> list[Feed]:
    pool: list[Feed] = []
    bytes_ = 0
    for feed in feeds:
        pool.append(feed)
        bytes_ += sum(array.nbytes for array in feed.values())
        if len(pool) == POOL_FEEDS or bytes_ >= POOL_BYTES:
            break
    return pool


def _real(data: Dataset, size: int) -> Iterable[Feed]:
    for feed, _ in data.batches(size):
        if all(len(array) == size for array in feed.values()):
            yield feed


def _random(inputs: tuple[TensorSpec, ...], size: int, rng: np.random.Generator) -> Iterable[Feed]:
    for spec in inputs:
        if open_ := [dim for dim in spec.shape[1:] if isinstance(dim, str)]:
            raise UsageError(
                f"random inputs need known sizes, {spec} leaves {open_[0]!r} open",
                hint="give --data with inputs of a real size",
            )
    for _ in range(POOL_FEEDS):
        yield {
            spec.name: _noise(np.dtype(spec.dtype), (size, *map(int, spec.shape[1:])), rng)
            for spec in inputs
        }


def _noise(dtype: np.dtype[np.generic], shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Standard normal floats, full range for bytes; other integers are 0 or 1, safe indices."""
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(256 if dtype == np.uint8 else 2, size=shape).astype(dtype)


def _check_fit(candidate: Candidate, feed: Feed) -> None:
    wanted = {spec.name: spec for spec in candidate.artifact.inputs}
    if set(wanted) != set(feed):
        raise InputError(
            f"{candidate.name} takes {sorted(wanted)}, the first model takes {sorted(feed)}",
            hint="bench models with the same inputs",
        )
    for name, spec in wanted.items():
        if misfit := spec.misfit(feed[name]):
            raise InputError(
                f"{candidate.name}: input {name!r}: {misfit}",
                hint="bench models with the same inputs",
            )
