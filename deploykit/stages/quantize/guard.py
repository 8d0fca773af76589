"""Calibration data that would mislead is refused, or told about."""

from __future__ import annotations

import math
import statistics

import numpy as np

from deploykit.dataset import Dataset
from deploykit.errors import InputError
from deploykit.stages.quantize.calibration import Calibration
from deploykit.stages.quantize.histogram import Histogram
from deploykit.values import Array, Preprocessing, TensorSpec

MOST_SHARED = 0.01
"""Share of samples that may be equal to others; public data sets hold a few duplicates."""
ROUGH, GOOD = 0.5, 0.1
"""Ranges known no better than the one are refused, no better than the other told about."""
COMPARED = 64
"""Samples whose mean and spread are compared with those of the evaluation data."""


def check_samples(data: Dataset, evaluated: Dataset | None) -> None:
    """Raises InputError: samples that occur twice, or that the score will be taken on too."""
    digests = data.sample_digests()
    twice = len(data) - len(digests)
    if twice > MOST_SHARED * len(data):
        raise InputError(
            f"{twice} of {len(data)} samples in {data.reference} are repetitions",
            hint="give samples that differ: a repeated one tells nothing new about the ranges"
            if len(digests) > 1
            else "calibrate on real data: a constant input tells nothing about the ranges",
        )
    if evaluated is None:
        return
    shared = len(digests & evaluated.sample_digests())
    if shared > MOST_SHARED * len(digests):
        raise InputError(
            f"{shared} of {len(digests)} calibration samples are in {evaluated.reference} too",
            hint="hold samples back for evaluation: a score on known samples says nothing",
        )


def check_inputs(inputs: tuple[TensorSpec, ...], seen: Calibration, data: Dataset) -> None:
    """Raises InputError: an input never changes."""
    for spec in inputs:
        histogram = seen.get(spec.name)
        if histogram and not histogram.masked and histogram.low == histogram.high:
            raise InputError(
                f"input {spec.name!r} is {seen[spec.name].low} in all of {data.reference}",
                hint="calibrate on real data: a constant input tells nothing about the ranges",
            )


def check_enough(seen: Calibration, data: Dataset) -> list[str]:
    """A warning where the ranges are only roughly known; `data` is what was calibrated on.

    The largest magnitudes of the samples vary; with n of them their mean is known within
    1.96 * s / sqrt(n) at 95 % confidence, relative to it, in the median tensor. Raises InputError:
    that is more than ROUGH; the message says how many samples would do.
    """
    errors = [e for histogram in seen.values() if (e := relative_error(histogram)) is not None]
    if not errors:
        if any(histogram.samples == 1 for histogram in seen.values()):
            raise InputError(
                f"{data.reference}, calibrated on {len(data)} samples: nothing tells how far they "
                "stand for others",
                hint="give at least two batches, better dozens of samples",
            )
        return []
    error, count = statistics.median(errors), len(data)
    enough = math.ceil(count * (error / GOOD) ** 2)
    told = f"{data.reference}, calibrated on {count} samples: ranges are known within {error:.0%}"
    if error > ROUGH:
        raise InputError(told, hint=f"about {enough} samples would bring that to {GOOD:.0%}")
    return (
        [f"{told}, about {enough} samples would bring that to {GOOD:.0%}"] if error > GOOD else []
    )


def relative_error(seen: Histogram) -> float | None:
    """95 % half-width of the mean of the samples' largest magnitudes, over that mean.

    None where there is no telling: fewer than two samples, or all zero.
    """
    if seen.samples < 2 or not seen.largest:
        return None
    mean = seen.largest / seen.samples
    spread = max(seen.largest_squares / seen.samples - mean * mean, 0) * (
        seen.samples / (seen.samples - 1)
    )
    return float(1.96 * math.sqrt(spread / seen.samples) / mean)


def compared(data: Dataset, evaluated: Dataset | None) -> list[str]:
    """Warnings for inputs that look unlike the evaluation data's: other preprocessing?

    Where there is none to compare with, for inputs that look like pixels as they were stored.
    """
    if evaluated is None:
        return [
            f"input {name!r} is pixels as stored, whole numbers up to {array.max():.0f}: is that "
            "what the model takes? A score on evaluation data (--max-drop) would tell"
            for name, array in _floats(data).items()
            if _stored_pixels(array)
        ]
    ours, theirs = _moments(data), _moments(evaluated)
    return [
        f"input {name!r} has mean {ours[name][0]:.3g} and spread {ours[name][1]:.3g}, in the "
        f"evaluation data {theirs[name][0]:.3g} and {theirs[name][1]:.3g}: preprocessed alike?"
        for name in ours
        if name in theirs and _unlike(ours[name], theirs[name])
    ]


def check_preprocessing(known: Preprocessing | None, data: Dataset) -> None:
    """Raises InputError: the images are not made into arrays as the model's record says."""
    if known and data.preprocessing and known != data.preprocessing:
        raise InputError(
            f"{data.reference} is preprocessed as {data.preprocessing}, and the model was made "
            f"with {known}",
            hint="give the data the preprocessing.toml of the model",
        )


def _floats(data: Dataset) -> dict[str, Array]:
    """The first COMPARED samples of each float input."""
    feed, _ = next(data.first(COMPARED).batches(COMPARED))
    return {name: array for name, array in feed.items() if array.dtype.kind == "f"}


def _stored_pixels(array: Array) -> bool:
    """Whether these are images of three or four axes with values 0 to 255, none between."""
    whole = array.ndim >= 3 and array.size and (array == np.rint(array)).all()
    return bool(whole and array.min() >= 0 and 100 < array.max() <= 255)


def _moments(data: Dataset) -> dict[str, tuple[float, float]]:
    return {name: (float(np.mean(a)), float(np.std(a))) for name, a in _floats(data).items()}


def _unlike(one: tuple[float, float], other: tuple[float, float]) -> bool:
    wide, narrow = max(one[1], other[1]), min(one[1], other[1])
    return wide > 2 * narrow or abs(one[0] - other[0]) > wide
