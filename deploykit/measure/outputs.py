"""Correctness first: outputs that are wrong void a timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deploykit.metrics import cosine
from deploykit.values import Array, Feed, TensorSpec

LEAST_COSINE = 0.5
"""INT8 and FP32 differ rightly, yet correlate; below this an output is a wrong one."""
LEAST_VALUES = 8
"""With fewer values a rounding may turn the cosine; it is recorded but voids nothing."""
REPEATABLE = 1e-3
"""Largest difference of two runs of one session, as a share of the largest value."""


def not_finite(outputs: Sequence[Feed]) -> str | None:
    """Name the first output with NaN or infinite values, or None."""
    for output in outputs:
        for name, array in output.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return f"output {name!r} has NaN or infinite values"
    return None


def changed(before: Sequence[Feed], after: Sequence[Feed]) -> str | None:
    """Say which output was not the same after timing as before, or None."""
    for first, second in zip(before, after, strict=True):
        for name, array in first.items():
            if not _same(array, second[name]):
                return f"output {name!r} changed between the first run and the last"
    return None


def mismatch(
    reference: Sequence[Feed], candidate: Sequence[Feed], specs: Sequence[TensorSpec]
) -> str | None:
    """Say which name or shape differs from the reference's, or None.

    `specs` are the reference's outputs: axes that these leave open, but the first, may depend on
    the data (boxes found), and are not compared.
    """
    for want, have in zip(reference, candidate, strict=False):
        if set(want) != set(have):
            return f"the outputs are {sorted(have)}, the baseline's {sorted(want)}"
        for spec in specs:
            shapes = want[spec.name].shape, have[spec.name].shape
            if shapes[0] != shapes[1] and not _free(spec):
                return f"output {spec.name!r} has shape {shapes[1]}, the baseline's {shapes[0]}"
    return None


def cosines(reference: Sequence[Feed], candidate: Sequence[Feed]) -> dict[str, float]:
    """Cosine with the reference by output, over the feeds that both ran.

    Outputs whose shapes differ because they depend on the data are left out.
    """
    found = {}
    for name in reference[0]:
        pairs = [(w[name], h[name]) for w, h in zip(reference, candidate, strict=False)]
        if all(want.shape == have.shape for want, have in pairs):
            sides = zip(*pairs, strict=True)
            found[name] = cosine(*(np.concatenate([a.ravel() for a in side]) for side in sides))
    return found


def uncorrelated(found: Mapping[str, float], reference: Sequence[Feed]) -> str | None:
    """Name the first output of `cosines` that is a wrong one, or None.

    Outputs of integers (labels, indices) say nothing by their cosine.
    """
    for name, value in found.items():
        array = reference[0][name]
        telling = array.dtype.kind == "f" and array.size * len(reference) >= LEAST_VALUES
        if telling and not value >= LEAST_COSINE:
            return f"output {name!r} is wrong: its cosine with the baseline's is {value:.3f}"
    return None


def _same(before: Array, after: Array) -> bool:
    if before.shape != after.shape:
        return False
    if before.dtype.kind not in "fiu":
        return bool((before == after).all())
    largest = float(np.abs(before).max(initial=0))
    gap = np.abs(before.astype(np.float64) - after.astype(np.float64))
    return bool(gap.max(initial=0.0) <= REPEATABLE * largest)


def _free(spec: TensorSpec) -> bool:
    return any(isinstance(dim, str) for dim in spec.shape[1:])
