"""Run a session over data: outputs, scores, differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from deploykit import _files, metrics
from deploykit._code import load_function, split_reference
from deploykit.dataset import Dataset, padded
from deploykit.errors import InputError
from deploykit.session import Session
from deploykit.values import Array, Difference, Interval, Score

Outputs = dict[str, Array]
Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


def collect(
    session: Session, data: Dataset, *, batch_size: int = 64, progress: Progress | None = None
) -> tuple[Outputs, Array | None]:
    """Outputs and targets stacked over the data.

    A model of fixed batch is fed full batches, the last one padded with its last sample. Raises
    InputError: the data does not fit the model.
    """
    bound = data.matching(session.inputs)
    fixed = session.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else batch_size
    outputs: dict[str, list[Array]] = {spec.name: [] for spec in session.outputs}
    targets: list[Array] = []
    done = 0
    for feed, target in bound.batches(size):
        count = len(next(iter(feed.values())))
        fed = feed if isinstance(fixed, str) else {n: padded(a, size) for n, a in feed.items()}
        for name, array in session.run(fed).items():
            outputs[name].append(array[:count])
        if target is not None:
            targets.append(target)
        done += count
        if progress:
            progress(done, len(bound))
    stacked = {name: np.concatenate(parts) for name, parts in outputs.items()}
    return stacked, np.concatenate(targets) if targets else None


def evaluate(
    session: Session,
    data: Dataset,
    metric: str,
    *,
    reference: Outputs | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Score:
    """Score a session on data by a built-in metric or `file.py:function`.

    `reference` holds the outputs of the reference model on the same data, for metrics that compare.
    Raises InputError: the data does not fit, lacks labels, or the metric fails.
    """
    outputs, targets = collect(session, data, batch_size=batch_size, progress=progress)
    return score(outputs, targets, metric, reference=reference)


def score(
    outputs: Outputs, targets: Array | None, metric: str, *, reference: Outputs | None = None
) -> Score:
    """Score outputs as `evaluate` does. Raises InputError: labels are missing, the metric fails."""
    if ":" not in metric:
        return metrics.score(metric, outputs, targets, reference)
    value = _call(metric, outputs, targets, reference)
    return Score(
        metric=Path(split_reference(metric)[0]).name + ":" + split_reference(metric)[1],
        score=Interval(value=value, low=float("nan"), high=float("nan")),
        samples=len(next(iter(outputs.values()))),
    )


def metric_identity(metric: str) -> str:
    """What decides a metric's values: its name, or the digest of the user's file."""
    place, name = split_reference(metric)
    return f"{_files.sha256(place)}:{name}" if place.suffix == ".py" else metric


def _call(metric: str, outputs: Outputs, targets: Array | None, reference: Outputs | None) -> float:
    function: metrics.UserMetric = load_function(metric)
    try:
        value = float(function(outputs, targets, reference))
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the metric {metric} raises {type(error).__name__}: {error}",
            hint="it is called with (outputs, target, reference) and returns a number",
        ) from error
    if not np.isfinite(value):
        raise InputError(f"the metric {metric} gives {value}", hint="return a finite number")
    return value


def compare(
    reference: Session, candidate: Session, data: Dataset, *, batch_size: int = 64
) -> tuple[Difference, ...]:
    """Differences of each output over the data. Raises InputError: outputs differ in name."""
    want, _ = collect(reference, data, batch_size=batch_size)
    have, _ = collect(candidate, data, batch_size=batch_size)
    return metrics.differences(want, have)
