"""Data: re-iterable, sized, with a digest; yields batches that fit the model.

A reference is one `.npz` or a folder of them (the first axis of each array is the sample, `target`
holds labels), a folder of images (one sub-folder a class, if any) with `preprocessing.toml`, or
`file.py:function` that gives an iterable of feeds or `(feed, target)` pairs, one sample each.
A `preprocessing.toml` in the folder of an `.npz` turns its uint8 arrays into what the model takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deploykit import _files, _npz
from deploykit._chunks import Chunk, alike, rebatched
from deploykit._code import load_function, split_reference
from deploykit.errors import InputError
from deploykit.preprocessing import PREPROCESSING_FILE, normalize, read_image, read_preprocessing
from deploykit.values import BATCH, Array, Preprocessing, TensorSpec

TARGET = "target"
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples that can be read again and again, in the same order."""

    reference: str
    samples: int
    digest: str
    chunks: Callable[[], Iterator[Chunk]]
    preprocessing: Preprocessing | None = None
    inputs: tuple[TensorSpec, ...] = ()
    """What `matching` checks each batch against."""

    def __len__(self) -> int:
        return self.samples

    def batches(self, size: int) -> Iterator[tuple[Chunk, Array | None]]:
        """Feeds of `size` samples (the last may be smaller) and their targets.

        Raises InputError: an array does not fit the model or holds NaN or infinite values, or the
        samples are not alike.
        """
        left = self.samples
        for chunk in rebatched(alike(self.chunks(), self.reference), size):
            taken = {name: array[:left] for name, array in chunk.items()}
            target = taken.pop(TARGET, None)
            yield self._fitting(taken), target
            left -= size
            if left <= 0:
                return
        raise _used_up(self.reference)

    def first(self, count: int) -> Dataset:
        """The first `count` samples."""
        if count >= self.samples:
            return self
        digest = hashlib.sha256(f"{self.digest}[:{count}]".encode()).hexdigest()
        return replace(self, samples=count, digest=digest)

    def split(self, step: int) -> tuple[Dataset, Dataset]:
        """One of every `step` samples in turn apart: the others, and those (see `picked`)."""
        apart = picked(self.samples, step)

        def part(name: str, picks: Callable[[Array], Array]) -> Dataset:
            def chunks() -> Iterator[Chunk]:
                start = 0
                for chunk in self.chunks():
                    numbers = np.arange(start, start + len(next(iter(chunk.values()))))
                    start = int(numbers[-1]) + 1
                    known = numbers[numbers < self.samples]
                    rows = np.zeros(len(numbers), bool)
                    rows[: len(known)] = picks(apart[known])
                    if rows.any():
                        yield {key: array[rows] for key, array in chunk.items()}

            digest = hashlib.sha256(f"{self.digest}[{name} in {step}]".encode()).hexdigest()
            count = int(picks(apart).sum())
            return replace(self, samples=count, digest=digest, chunks=chunks)

        return (
            part("rest", np.logical_not),
            part("one", np.asarray),
        )

    def matching(self, inputs: tuple[TensorSpec, ...]) -> Dataset:
        """The same data, bound to what a model takes.

        Raises InputError: a name is missing, or an input has its batch elsewhere, or none.
        """
        names = set(next(self.chunks())) - {TARGET}
        wanted = {spec.name for spec in inputs}
        if missing := wanted - names:
            raise InputError(
                f"{self.reference}: no array for the model input {sorted(missing)[0]!r}; "
                f"the data has {sorted(names)}",
                hint="name the arrays as the model names its inputs",
            )
        if extra := names - wanted:
            raise InputError(
                f"{self.reference}: {sorted(extra)[0]!r} is no input of the model; "
                f"it takes {sorted(wanted)}",
                hint="name the arrays as the model names its inputs; labels are called 'target'",
            )
        first = {spec.name: spec.shape[0] if spec.shape else None for spec in inputs}
        counted = any(isinstance(size, str) for size in first.values())
        for spec in inputs:
            if not spec.shape or (counted and isinstance(first[spec.name], int)):
                raise InputError(
                    f"the first axis of {spec} does not count samples, as that of every input must",
                    hint="wrap the model: the batch first, and constants inside",
                )
        return replace(self, inputs=inputs)

    def specs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the data, with a dynamic batch."""
        chunk = next(self.chunks())
        return tuple(
            TensorSpec(name=name, dtype=str(array.dtype), shape=(BATCH, *array.shape[1:]))
            for name, array in chunk.items()
            if name != TARGET
        )

    def sample_digests(self) -> set[bytes]:
        """One digest a sample, over its inputs: equal samples have equal digests."""
        found = set()
        for feed, _ in self.batches(256):
            arrays = [np.ascontiguousarray(feed[name]) for name in sorted(feed)]
            for row in zip(*arrays, strict=True):
                found.add(hashlib.sha256(b"".join(a.tobytes() for a in row)).digest())
        return found

    def _fitting(self, feed: Chunk) -> Chunk:
        for name, array in feed.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(
                    f"{self.reference}: {name!r} has NaN or infinite values",
                    hint="clean the data; a model fed with it would be calibrated on nonsense",
                )
        for spec in self.inputs:
            array = feed[spec.name]
            # A fixed batch is the model's affair: sessions pad; here only the sample must fit.
            sample = spec.model_copy(update={"shape": (BATCH, *spec.shape[1:])})
            if misfit := sample.misfit(array):
                raise InputError(
                    f"{self.reference}: {spec.name!r}: {misfit}",
                    hint="give data of the model's dtype and shape, "
                    f"or a {PREPROCESSING_FILE} beside it",
                )
        return feed


def padded(array: Array, size: int) -> Array:
    """Repeat the last sample until there are `size`, for a model of fixed batch."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), 0)])


def picked(samples: int, step: int) -> Array:
    """Which samples are set apart: one of every `step` in turn, which one by chance (seeded).

    Spread over the data as it lies, and free of whatever period it has.
    """
    blocks = samples // step
    chance = np.random.default_rng(0).integers(0, step, blocks)
    apart = np.zeros(samples, bool)
    apart[np.arange(blocks) * step + chance] = True
    return apart


def open_dataset(reference: str | Path) -> Dataset:
    """Open data by its reference. Raises InputError: it is missing, empty, torn or of no kind."""
    text = str(reference)
    if ":" in text and split_reference(text)[0].suffix == ".py":
        return _from_function(text)
    path = Path(text)
    if not path.exists():
        raise InputError(
            f"{path}: no such data", hint="give an .npz file, a folder or file.py:function"
        )
    if path.suffix == ".npz":
        return _from_arrays(text, [path], path.parent)
    if path.is_dir() and (files := sorted(path.glob("*.npz"))):
        return _from_arrays(text, files, path)
    if path.is_dir():
        return _from_images(text, path)
    raise InputError(
        f"{path}: data of an unknown kind", hint="give an .npz file, a folder or file.py:function"
    )


def _from_arrays(reference: str, files: list[Path], folder: Path) -> Dataset:
    spec = folder / PREPROCESSING_FILE
    preprocessing = read_preprocessing(spec) if spec.exists() else None

    def chunks() -> Iterator[Chunk]:
        for file in files:
            for chunk in _npz.chunks(file):
                yield _normalized(chunk, preprocessing, file)

    parts = [_files.sha256(file) for file in (*files, *([spec] if preprocessing else []))]
    samples = sum(_npz_length(file) for file in files)
    return _checked(reference, samples, "".join(parts), chunks, preprocessing)


def _checked(
    reference: str,
    samples: int,
    identity: str,
    chunks: Callable[[], Iterator[Chunk]],
    preprocessing: Preprocessing | None,
) -> Dataset:
    if not samples:
        raise InputError(f"{reference}: the data is empty", hint="give at least one sample")
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Dataset(reference, samples, digest, chunks, preprocessing)


def _npz_length(path: Path) -> int:
    kinds = _npz.headers(path)
    return _length({name: kind.shape[0] if kind.shape else 0 for name, kind in kinds.items()}, path)


def _length(lengths: Mapping[str, int], path: Path) -> int:
    if not set(lengths) - {TARGET}:
        raise InputError(f"{path}: no arrays", hint="name one array for each model input")
    if len(set(lengths.values())) != 1:
        raise InputError(
            f"{path}: the arrays have different numbers of samples: {dict(lengths)}",
            hint="the first axis of each array is the sample",
        )
    return next(iter(lengths.values()))


def _normalized(chunk: Chunk, spec: Preprocessing | None, source: Path) -> Chunk:
    """Scale uint8 arrays as the preprocessing says; other arrays stay as they are."""
    if spec is None:
        return chunk
    if spec.input not in chunk:
        raise InputError(
            f"{source}: {PREPROCESSING_FILE} is for {spec.input!r}, the data has {sorted(chunk)}",
            hint=f"correct 'input' in {PREPROCESSING_FILE}",
        )
    pixels = chunk[spec.input]
    if pixels.dtype != np.uint8:
        raise InputError(
            f"{source}: {PREPROCESSING_FILE} is for 8-bit images, {spec.input!r} is {pixels.dtype}",
            hint=f"remove {PREPROCESSING_FILE} if the arrays are preprocessed already",
        )
    return {**chunk, spec.input: normalize(pixels, spec)}


def _from_images(reference: str, folder: Path) -> Dataset:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise InputError(f"{folder}: neither .npz files nor images in it", hint="give data")
    spec_path = folder / PREPROCESSING_FILE
    if not spec_path.exists():
        raise InputError(
            f"{folder}: images need a preprocessing spec",
            hint=f"write {spec_path} with resize, crop, color, layout, scale, mean, std",
        )
    spec = read_preprocessing(spec_path)
    classes = sorted({p.parent.relative_to(folder) for p in files})
    labelled = Path() not in classes

    def chunks() -> Iterator[Chunk]:
        for file in files:
            chunk: Chunk = {spec.input: normalize(read_image(file, spec)[None], spec)}
            if labelled:
                chunk[TARGET] = np.array([classes.index(file.parent.relative_to(folder))])
            yield chunk

    names = [f"{p.relative_to(folder)}\0{_files.sha256(p)}" for p in (*files, spec_path)]
    return _checked(reference, len(files), "\n".join(names), chunks, spec)


def _from_function(reference: str) -> Dataset:
    function = load_function(reference)

    def chunks() -> Iterator[Chunk]:
        for item in _called(function, reference):
            yield _as_chunk(item, reference)

    samples, digest = _surveyed(chunks(), reference)
    again, second = _surveyed(chunks(), reference)
    if again < samples:
        raise _used_up(reference)
    if second != digest:
        raise InputError(
            f"{reference} gives other samples the second time than the first",
            hint="data is read again and again: seed what is random in it",
        )
    return _checked(reference, samples, digest, chunks, None)


def _surveyed(chunks: Iterator[Chunk], reference: str) -> tuple[int, str]:
    """Number of samples, and the digest of their names, types and values."""
    digest, samples = hashlib.sha256(), 0
    for chunk in chunks:
        samples += _length({name: len(array) for name, array in chunk.items()}, Path(reference))
        for name in sorted(chunk):
            digest.update(f"{name}{chunk[name].dtype}{chunk[name].shape}".encode())
            digest.update(np.ascontiguousarray(chunk[name]).tobytes())
    return samples, digest.hexdigest()


def _used_up(reference: str) -> InputError:
    return InputError(
        f"{reference} gives fewer samples the second time than the first",
        hint="data is read again and again: give a function that starts anew at each call",
    )


def _called(function: Callable[[], object], reference: str) -> Iterator[object]:
    """What the user's function gives, one by one. Raises InputError: it raises, or no iterable."""
    try:
        made = function()
        if isinstance(made, Iterable):
            yield from made
            return
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the data function {reference} raises {type(error).__name__}: {error}",
            hint="it is called without arguments and gives one sample after the other",
        ) from error
    raise InputError(
        f"{reference} gives {type(made).__name__}, not an iterable",
        hint="return or yield feeds ({name: array}) or (feed, target) pairs",
    )


def _as_chunk(item: object, reference: str) -> Chunk:
    feed, target = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(feed, dict):
        raise InputError(
            f"{reference} yields {type(feed).__name__}, not a feed",
            hint="yield {name: array} or ({name: array}, target), one sample each, no batch axis",
        )
    chunk = {name: np.asarray(value)[None] for name, value in feed.items()}
    if target is not None:
        chunk[TARGET] = np.asarray(target)[None]
    return chunk
