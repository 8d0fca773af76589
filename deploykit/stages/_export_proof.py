"""What was exported against PyTorch: at which sizes, on what, and how far apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit._shapes import resized
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.formats import torch_folder
from deploykit.metrics import differences
from deploykit.session import Session
from deploykit.values import Array, Difference, Dimension, Feed, Json, TensorSpec

Outputs = dict[str, Array]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Check:
    """One comparison: the sizes of the dynamic dimensions; `promised` if they were asked for."""

    dimension: str
    sizes: Sizes
    promised: bool

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "a fixed shape"


def checks(
    inputs: tuple[TensorSpec, ...], dimensions: Sequence[Dimension], batch_sizes: Sequence[int]
) -> list[Check]:
    """The comparisons to make: one dimension at a time away from its usual size.

    Samples: `batch_sizes` and the ends of a range that was asked for. Others: the ends, the usual
    size, and sizes that the exporter never saw; where no range was asked for, the model may refuse
    these.
    """
    usual = {d.name: d.usual for d in dimensions}
    first = {spec.shape[0] for spec in inputs}
    made = []
    for d in dimensions:
        ends = {d.low, d.high} if d.high is not None else {d.low} if d.low > 1 else set()
        asked = {size for size in ends if size is not None}
        asked |= {s for s in batch_sizes if d.holds(s)} if d.name in first else {d.usual}
        between = {d.nearest(d.usual + 1), *d.others()} if d.name not in first else set()
        made += [
            Check(d.name, {**usual, d.name: size}, size in asked)
            for size in sorted(asked | between)
        ]
    return made or [Check("", {}, promised=True)]


class Feeds:
    """Feeds of any sizes: samples of the data in turn, cut or repeated; else the folder's."""

    def __init__(self, inputs: tuple[TensorSpec, ...], data: Dataset | None, folder: Path) -> None:
        self._inputs, self._folder, self._at = inputs, folder, 0
        self._data = next(data.batches(min(256, len(data))))[0] if data else None

    def __call__(self, sizes: Sizes) -> Feed:
        """The next feed."""
        if self._data is None:
            seed = sum(sizes.values())
            made = torch_folder.probe(self._folder, inputs=self._inputs, seed=seed, sizes=sizes)
            return {s.name: t.numpy() for s, t in zip(self._inputs, made, strict=True)}
        feed = {}
        for spec in self._inputs:
            array = np.roll(self._data[spec.name], -self._at, axis=0)
            feed[spec.name] = np.ascontiguousarray(resized(array, spec.fixed(sizes)))
        self._at += len(feed[self._inputs[0].name])
        return feed


class Mismatch(AnswerIsNo):
    """Outputs that differ by more than is allowed, and on what."""

    def __init__(self, fact: str, *, hint: str, feed: Feed) -> None:
        super().__init__(fact, hint=hint)
        self.feed = feed


@dataclass(frozen=True)
class Taken:
    """What PyTorch gave for a check; no outputs where it refuses a size that nobody asked for."""

    check: Check
    feed: Feed
    want: Outputs | None


def answers(
    reference: Callable[[Feed], Outputs], todo: Sequence[Check], feeds: Callable[[Sizes], Feed]
) -> list[Taken]:
    """PyTorch's outputs for all checks.

    Raises InputError: PyTorch itself does not run at a promised size, or gives NaN.
    """
    made = []
    for check in todo:
        feed = feeds(check.sizes)
        made.append(Taken(check, feed, _wanted(reference, feed, check)))
    return made


def prove(session: Session, taken: Sequence[Taken], tolerance: float) -> Json:
    """Facts of the comparison. Raises Mismatch: beyond the tolerance.

    StageError: what was exported does not run where PyTorch does, or at no size but the one of its
    making.
    """
    done: dict[str, dict[str, list[int]]] = {}
    worst: dict[str, Difference] = {}
    for one in taken:
        kept = done.setdefault(one.check.dimension, {"checked": [], "refused_by_the_model": []})
        size = one.check.sizes.get(one.check.dimension, 1)
        kept["checked" if one.want is not None else "refused_by_the_model"].append(size)
        if one.want is None:
            continue
        for gap in _gaps(one.want, session, one.feed, one.check):
            _hold(gap, one.feed, one.check, tolerance)
            old = worst.get(gap.output)
            worst[gap.output] = gap if old is None else _worse(old, gap)
    for name, kept in done.items():
        if name and len(kept["checked"]) < 2:
            raise StageError(
                f"the model runs with {name} {kept['checked']} alone, not {kept}",
                hint="leave that axis fixed",
            )
    return {
        "dynamic": {name: kept for name, kept in done.items() if name},
        "outputs": {n: d.model_dump(exclude={"output"}) for n, d in worst.items()},
        "largest_relative_difference": max(d.max_relative for d in worst.values()),
    }


def _wanted(reference: Callable[[Feed], Outputs], feed: Feed, check: Check) -> Outputs | None:
    """PyTorch's outputs; None where it refuses a size that nobody asked for."""
    try:
        want = reference(feed)
    except Exception as error:  # a model may raise anything
        if not check.promised:
            return None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model itself does not run with {check}: {reason}",
            hint="ask for a range (--dynamic-axis) and batch sizes (--verify-batch-sizes) that it "
            "runs at",
        ) from error
    for name, array in want.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InputError(
                f"the model's own output {name!r} has NaN with {check}",
                hint="give --data with inputs that it works on, or correct the model",
            )
    return want


def _gaps(want: Outputs, session: Session, feed: Feed, check: Check) -> tuple[Difference, ...]:
    try:
        have = session.run(feed)
    except Exception as error:  # the runtime's exceptions share no base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"the exported model does not run with {check}, where PyTorch does: {reason}",
            hint="the model makes a number of a size: take it from a tensor's shape",
        ) from error
    for name, array in want.items():
        if array.shape != have[name].shape:
            raise StageError(
                f"output {name!r} is {have[name].shape} with {check}, of PyTorch {array.shape}",
                hint="the model makes a number of a size: take it from a tensor's shape",
            )
    pairs = {name: _finite(array, have[name]) for name, array in want.items()}
    return differences({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})


def _finite(want: Array, have: Array) -> tuple[Array, Array]:
    """Both without infinities where they have the same ones."""
    if want.dtype.kind != "f" or np.isfinite(want).all():
        return want, have
    same = np.isinf(want) & (want == have)
    return np.where(same, 0, want), np.where(same, 0, have)


def apart(want: Array, have: Array, tolerance: float) -> bool:
    """Whether two arrays differ by more than this part of the largest value, or in shape."""
    if want.shape != have.shape:
        return True
    want, have = _finite(want, have)
    gap = np.abs(want.astype(np.float64) - have.astype(np.float64)).max(initial=0)
    largest = np.abs(want.astype(np.float64)).max(initial=0)
    return not gap <= tolerance * (largest or 1)


def _hold(gap: Difference, feed: Feed, check: Check, tolerance: float) -> None:
    if not gap.max_relative <= tolerance:  # also true for NaN
        raise Mismatch(
            f"output {gap.output!r} differs from PyTorch with {check}: "
            f"{gap.max_relative:.2e} of its largest value, allowed {tolerance:.0e}",
            hint="`deploykit compare` shows more; raise --tolerance only if that is enough",
            feed=feed,
        )


def _worse(one: Difference, other: Difference) -> Difference:
    """The worse of each number."""
    agreements = [a for a in (one.agreement, other.agreement) if a is not None]
    return Difference(
        output=one.output,
        max_absolute=max(one.max_absolute, other.max_absolute),
        max_relative=max(one.max_relative, other.max_relative),
        cosine=min(one.cosine, other.cosine),
        sqnr_db=min(one.sqnr_db, other.sqnr_db),
        agreement=min(agreements) if agreements else None,
    )
