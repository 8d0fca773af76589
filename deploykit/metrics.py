"""Scores and distances of outputs. Outputs map a name to an array stacked over the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from deploykit.errors import InputError, UsageError, did_you_mean
from deploykit.values import Array, Difference, Interval, Score

PerSample = Callable[[Array, Array | None, Array | None], Array]
"""(output, target, reference) to one float64 a sample."""


def _top(k: int) -> PerSample:
    def hits(output: Array, target: Array | None, reference: Array | None) -> Array:
        del reference
        logits = _classes(output)
        assert target is not None  # noqa: S101 - `score` has checked it
        accepted = _labels(target, logits)
        found: Array = (_best(logits, k)[:, :, None] == accepted[:, None, :]).any((1, 2))
        return found.astype(np.float64)

    return hits


def _best(logits: Array, k: int) -> Array:
    """The k classes of largest value; as with argmax, the first of equal values comes first."""
    if k == 1:
        best: Array = logits.argmax(1)[:, None]
    else:
        backwards = np.argsort(logits[:, ::-1], axis=1, kind="stable")[:, ::-1]
        best = logits.shape[1] - 1 - backwards[:, :k]
    return best


def _agreement(output: Array, target: Array | None, reference: Array | None) -> Array:
    del target
    assert reference is not None  # noqa: S101 - `score` has checked it
    if output.ndim < 2 or output.shape[-1] < 2:
        raise InputError(
            f"agreement needs an output of several classes, this one has shape {output.shape}",
            hint="choose another metric: cosine, sqnr or file.py:function",
        )
    same: Array = output.argmax(-1) == reference.argmax(-1)
    shares: Array = same.reshape(len(same), -1).mean(1)
    return shares


def _cosine(output: Array, target: Array | None, reference: Array | None) -> Array:
    del target
    assert reference is not None  # noqa: S101 - `score` has checked it
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (output, reference))
    return np.array([cosine(p, q) for p, q in zip(a, b, strict=True)])


def _sqnr(output: Array, target: Array | None, reference: Array | None) -> Array:
    del target
    assert reference is not None  # noqa: S101 - `score` has checked it
    return np.array([sqnr_db(r, c) for r, c in zip(reference, output, strict=True)])


METRICS: dict[str, PerSample] = {
    "top1": _top(1),
    "top5": _top(5),
    "agreement": _agreement,
    "cosine": _cosine,
    "sqnr": _sqnr,
}
LIKE_ITSELF = frozenset({"sqnr"})
"""Metrics that are infinite for the float model, which is the reference itself."""
UP_TO_ONE = frozenset(METRICS) - LIKE_ITSELF
"""Metrics that are 1 at best: a drop of 1 is all there is to lose."""
NEED_TARGET = frozenset({"top1", "top5"})
UserMetric = Callable[[Mapping[str, Array], Array | None, Mapping[str, Array] | None], float]


def score(
    metric: str,
    outputs: Mapping[str, Array],
    target: Array | None,
    reference: Mapping[str, Array] | None,
) -> Score:
    """Score the first output by a built-in metric.

    Raises UsageError: unknown metric. InputError: the data has no target or there is no reference
    for these outputs, or the outputs hold NaN.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", hint=did_you_mean(metric, METRICS))
    name, output = next(iter(outputs.items()))
    _check_finite(name, output)
    if metric in NEED_TARGET and target is None:
        raise InputError(
            f"metric {metric!r} needs labels and the data has no 'target'",
            hint="add an array 'target', or use the metric 'agreement'",
        )
    if metric not in NEED_TARGET and reference is None:
        raise InputError(
            f"metric {metric!r} compares with a reference model and none was given",
            hint="give the reference model (--reference)",
        )
    values = METRICS[metric](output, target, _counterpart(name, output, reference))
    return Score(
        metric=metric,
        score=mean_interval(values),
        samples=len(values),
        per_sample=tuple(values.tolist()),
    )


def _counterpart(name: str, output: Array, reference: Mapping[str, Array] | None) -> Array | None:
    """What the reference gave where this model gave `output`. Raises InputError: nothing alike."""
    if reference is None:
        return None
    if name not in reference or reference[name].shape != output.shape:
        shapes = {n: a.shape for n, a in reference.items()}
        raise InputError(
            f"output {name!r} of shape {output.shape} is not in the reference, which has {shapes}",
            hint="compare models with the same outputs",
        )
    _check_finite(f"{name} (reference)", reference[name])
    return reference[name]


def _check_finite(name: str, output: Array) -> None:
    if not np.isfinite(output).all():
        raise InputError(
            f"output {name!r} has NaN or infinite values", hint="the model is broken on this data"
        )


def mean_interval(values: Array) -> Interval:
    """Mean and its 95 % interval: Wilson's for shares (0 and 1 only), else Student's t."""
    from scipy import stats

    if np.isin(values, (0.0, 1.0)).all():
        ci = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return Interval(value=float(values.mean()), low=float(ci.low), high=float(ci.high))
    return _student(values)


def _student(values: Array) -> Interval:
    """Mean and Student's 95 % interval; unbounded where no spread can be told."""
    from scipy import stats

    with np.errstate(invalid="ignore"):  # of inf and -inf the mean is NaN
        n, mean = len(values), float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Interval(value=mean, low=float("-inf"), high=float("inf"))
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(value=mean, low=mean - half, high=mean + half)


def drop(reference: Score, candidate: Score) -> Interval:
    """How much lower the candidate scores, with its 95 % interval.

    Paired over the samples (Student's t on the differences) where both scores have one value a
    sample of the same data; else the difference with the bounds added in quadrature.
    """
    ours, theirs = np.array(reference.per_sample or ()), np.array(candidate.per_sample or ())
    if len(ours) == len(theirs) > 0 and np.isfinite([ours, theirs]).all():
        lost = ours - theirs
        if not lost.any():
            # No difference in n samples: the rule of three bounds the share that may differ.
            return Interval(value=0.0, low=-3 / len(lost), high=3 / len(lost))
        return _student(lost)
    a, b = reference.score, candidate.score
    value = a.value - b.value
    half = float(np.hypot(a.high - a.low, b.high - b.low) / 2)
    return Interval(value=value, low=value - half, high=value + half)


def samples_to_settle(drop: Interval, limit: float, samples: int) -> float:
    """About how many samples would bring the upper bound of a drop down to the limit.

    The width goes with 1 / sqrt(n). `samples` where it is there already, infinite for a drop at the
    limit or beyond it.
    """
    room, half = limit - drop.value, drop.high - drop.value
    if drop.high <= limit:
        return samples
    return samples * (half / room) ** 2 if room > 0 else math.inf


def least_drop(reference: Score, candidate: Score, *, confidence: float) -> float:
    """A lower bound of `drop`, one-sided: Student's t on the paired differences.

    Minus infinity where the scores have no value a sample.
    """
    from scipy import stats

    ours, theirs = np.array(reference.per_sample or ()), np.array(candidate.per_sample or ())
    if not len(ours) == len(theirs) > 1 or not np.isfinite([ours, theirs]).all():
        return float("-inf")
    lost = ours - theirs
    error = lost.std(ddof=1) / np.sqrt(len(lost))
    return float(lost.mean() - stats.t.ppf(confidence, len(lost) - 1) * error)


def differences(
    reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> tuple[Difference, ...]:
    """Compare outputs of equal names. Raises InputError: names or shapes differ."""
    if set(reference) != set(candidate):
        raise InputError(
            f"the outputs differ in name: {sorted(reference)} and {sorted(candidate)}",
            hint="compare models with the same outputs",
        )
    return tuple(_difference(name, reference[name], candidate[name]) for name in reference)


def _difference(name: str, reference: Array, candidate: Array) -> Difference:
    if reference.shape != candidate.shape:
        raise InputError(
            f"output {name!r} has shape {reference.shape} and {candidate.shape}",
            hint="compare models with the same outputs",
        )
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    gap = float(np.abs(r - c).max(initial=0.0))
    largest = float(np.abs(r).max(initial=0.0))
    classes = r.ndim > 1 and r.shape[-1] > 1
    return Difference(
        output=name,
        max_absolute=gap,
        max_relative=gap / largest if largest else gap,
        cosine=cosine(r, c),
        sqnr_db=sqnr_db(r, c),
        agreement=float((r.argmax(-1) == c.argmax(-1)).mean()) if classes else None,
    )


def cosine(a: Array, b: Array) -> float:
    """Cosine of two arrays of equal shape, in [-1, 1]; two zero arrays give 1.0."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.clip(x @ y / norms, -1, 1)) if norms else float(np.array_equal(x, y))


def sqnr_db(reference: Array, candidate: Array) -> float:
    """10 log10 of signal over noise power, in dB; infinite for equal arrays."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    signal, noise = float((r * r).sum()), float(((r - c) ** 2).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


def _classes(output: Array) -> Array:
    if output.ndim != 2:
        raise InputError(
            f"top-k needs an output of [sample, class], this one has {output.ndim} axes",
            hint="choose another metric",
        )
    return output


def _labels(target: Array, logits: Array) -> Array:
    """The accepted classes of each sample, [sample, label]. Raises InputError: no such labels."""
    labels = target.reshape(len(target), -1)
    if target.dtype.kind not in "iu" or len(labels) != len(logits):
        problem = f"is {target.dtype}{list(target.shape)}"
    elif labels.shape[1] >= logits.shape[1] > 1:
        problem = f"has {labels.shape[1]} numbers a sample, as many as classes: it looks one-hot"
    elif not ((labels >= 0) & (labels < logits.shape[1])).any(1).all():
        problem = f"goes from {labels.min()} to {labels.max()}, not all are class numbers"
    else:
        return labels
    raise InputError(
        f"'target' {problem}; the output is {list(logits.shape)}",
        hint="give one integer a sample, the index of its class",
    )
