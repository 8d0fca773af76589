"""Candidates of one model on the runtime that they are for: written, run, timed, scored."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deploykit.backends import open_session
from deploykit.dataset import Dataset, padded
from deploykit.environment import read as read_environment
from deploykit.errors import InputError, StageError, UsageError
from deploykit.evaluation import collect
from deploykit.metrics import cosine, drop, least_drop
from deploykit.session import Session
from deploykit.stages.quantize import sound
from deploykit.stages.quantize.promise import CONFIDENCE, Look, Promise, looks
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.values import (
    Array,
    Artifact,
    Feed,
    Interval,
    Json,
    Kernel,
    Score,
    SessionOptions,
)

ROUNDS, SECONDS = (21, 500), 1.0
"""Fewest and most interleaved timings of each candidate, and how long they may take together."""

RUNS, RESAMPLES = 20, 499
"""Runs under the runtime's profiler; resamples of the bootstrap."""

Talk = Callable[[str, int, int], None]
"""Told what goes on, how many parts are done, and of how many."""


@dataclass(frozen=True)
class Point:
    """A candidate and what was measured of it."""

    name: str
    variant: Variant
    artifact: Artifact
    sqnr_db: float
    """Of all outputs on the held-back samples, against the float model."""
    score: float | None = None
    drop: Interval | None = None
    scored_samples: int | None = None
    """Those of the evaluation data, or a part of them that left no doubt."""
    time_ratio: float | None = None
    """Time over the float model's on the same runtime, one sample, one thread: of the medians."""
    time_bounds: tuple[float, float] | None = None
    """Its 95 % interval, from the rounds of one process."""
    times_ms: tuple[float, float] | None = None
    """Median times of the float model and of this, interleaved with one another."""
    timed_as: str | None = None
    """The candidate that was timed: itself, or the one with the same nodes and other ranges."""

    @property
    def told(self) -> Json:
        """As facts."""
        return {
            "name": self.name,
            "sqnr_db": round(self.sqnr_db, 2),
            "score": self.score,
            "drop": self.drop and self.drop.value,
            "drop_95": self.drop and _known(self.drop),
            "scored_samples": self.scored_samples,
            "time_ratio": self.time_ratio and round(self.time_ratio, 3),
            "time_ratio_95": self.time_bounds and [round(bound, 3) for bound in self.time_bounds],
            "float_ms": self.times_ms and round(self.times_ms[0], 4),
            "ms": self.times_ms and round(self.times_ms[1], 4),
            "timed_as": self.timed_as,
            "size_bytes": sum(p.stat().st_size for p in self.artifact.files),
        }


@dataclass(frozen=True)
class Likeness:
    """How near all outputs are to the float model's; each output counts alike."""

    sqnr_db: float
    """Signal to quantization noise: the noise is relative to the output's own power."""
    cosine: float


@dataclass(frozen=True)
class Damage:
    """What quantizing one node alone does to the outputs."""

    node: str
    sqnr_db: float
    work: int
    """Multiply-accumulates that integers save, above 0."""
    cosine: float

    @property
    def noise(self) -> float:
        """Power of the noise over that of the signal."""
        return float(10 ** (-self.sqnr_db / 10))


@dataclass
class Lab:
    """Where candidates of one model are written, run, timed and scored."""

    shop: Workshop
    backend: str
    held: Dataset
    promise: Promise | None
    folder: Path
    talk: Talk
    simulate: bool = False
    """Judge by simulation: the integers of the target are not those of this machine."""
    points: list[Point] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    float_score: Score | None = None
    broken: dict[str, str] = field(default_factory=dict)
    """Nodes that break the model when quantized, with the reason."""
    damages: list[Damage] = field(default_factory=list)
    """What each node alone does, once that was measured."""

    def __post_init__(self) -> None:
        self.batch_size = _batch(self.shop.source)
        self.options = SessionOptions(threads=read_environment().cores, simulate=self.simulate)
        with self._open(self.shop.source) as session:
            self.reference, _ = collect(session, self.held, batch_size=1)
            if self.promise:
                self.looks = looks(session, self.promise)
                self.float_score = self.looks[-1].score
                if not math.isfinite(self.float_score.score.value):
                    raise UsageError(
                        f"{self.promise.metric} of the float model is "
                        f"{self.float_score.score.value}: no drop from it can be allowed",
                        hint="take another metric, such as cosine or agreement",
                    )

    def _open(self, artifact: Artifact, threads: int | None = None) -> Session:
        options = SessionOptions(threads=threads) if threads else self.options
        return open_session(artifact, self.backend, options)

    def follow(self, artifact: Artifact, samples: Dataset | None = None) -> Likeness:
        """How the outputs follow the float model's. Raises InputError: it does not run."""
        with self._open(artifact) as session:
            have, _ = collect(session, samples or self.held, batch_size=1)
        pairs = [(self.reference[name][: len(have[name])], have[name]) for name in have]
        noise = float(np.mean([_noise(*pair) for pair in pairs]))
        return Likeness(
            sqnr_db=-10 * math.log10(max(noise, 1e-12)),
            cosine=float(np.mean([cosine(*pair) for pair in pairs])),
        )

    def kernels(self, artifact: Artifact, runs: int) -> tuple[Kernel, ...]:
        """The runtime's own profile of a model, one thread. Raises InputError: it does not run."""
        with self._open(artifact, 1) as session:
            return session.kernels(self._feed(), runs)

    def where_time_goes(self, artifact: Artifact) -> dict[str, float]:
        """The three operators that take most, as the runtime calls them: shares of the time."""
        times: dict[str, float] = defaultdict(float)
        for kernel in self.kernels(artifact, RUNS):
            times[kernel.operator] += kernel.microseconds
        most = sorted(times, key=lambda name: -times[name])[:3]
        return {name: round(times[name] / math.fsum(times.values()), 3) for name in most}

    def _feed(self) -> Feed:
        """What is timed: one sample, or as many as the model wants."""
        size = self.batch_size
        feed, _ = next(self.held.batches(size))
        return {name: padded(array, size) for name, array in feed.items()}

    def _follow_if_sound(self, artifact: Artifact) -> float:
        """Signal to noise as in `follow`, NaN for a model that the runtime does not take."""
        try:
            return self.follow(artifact).sqnr_db
        except InputError:
            return math.nan

    def try_out(self, name: str, variant: Variant) -> Point | None:
        """Write and run a candidate, without the nodes that break it; None if it stays broken."""
        artifact = self.shop.write(variant, self.folder / f"{name}.onnx")
        sqnr = self._follow_if_sound(artifact)
        if not math.isfinite(sqnr):
            try:
                variant, broken = sound.checked(
                    self.shop, variant, self.held, artifact.path, self._open
                )
            except StageError:
                return None
            self.broken |= broken
            sqnr = self._follow_if_sound(artifact)
            if not math.isfinite(sqnr):
                return None
        point = Point(name, variant, artifact, sqnr)
        self.points.append(point)
        return point

    def timed(self, points: Sequence[Point]) -> list[Point]:
        """The points with their times over the float model's, interleaved, one thread.

        All together, but large ones each alone with the float model.
        """
        if self.shop.large and len(points) > 1:
            return [each for point in points for each in self.timed([point])]
        feed = self._feed()
        artifacts = [self.shop.source, *(point.artifact for point in points)]
        # the float model last: what loading the others takes meanwhile is gone by then
        sessions = [self._open(artifact, 1) for artifact in reversed(artifacts)][::-1]
        calls = [session.prepare(feed) for session in sessions]
        for call in calls * 2:
            call()
        started = time.perf_counter()
        for call in calls:
            call()
        rounds = int(np.clip(SECONDS / (time.perf_counter() - started), *ROUNDS))
        times = np.empty((rounds, len(calls)))
        order = np.random.default_rng(0)
        for row in times:
            for number in order.permutation(len(calls)):
                started = time.perf_counter()
                calls[number]()
                row[number] = time.perf_counter() - started
        plain, *each = (1e3 * np.median(times, axis=0)).tolist()
        return [
            self.know(
                replace(
                    point,
                    time_ratio=ms / plain,
                    time_bounds=bounds,
                    times_ms=(plain, ms),
                    timed_as=point.name,
                )
            )
            for point, ms, bounds in zip(points, each, _bounds(times), strict=True)
        ]

    def scored(self, point: Point) -> Point:
        """The point with its score on the evaluation data, in the deployed runtime.

        A sequential test: what a first look at a part of the data shows to break the promise, with
        CONFIDENCE, is not run on the rest.
        """
        assert self.promise and self.float_score  # noqa: S101, PT018
        limit = self.promise.limit(self.float_score)
        *early, last = self.looks
        with self._open(point.artifact) as session:
            for look in early:
                have = look.at(session, self.promise.metric)
                if least_drop(look.score, have, confidence=CONFIDENCE) > limit:
                    return self._judged(point, look, have)
            return self._judged(point, last, last.at(session, self.promise.metric))

    def _judged(self, point: Point, look: Look, have: Score) -> Point:
        lost = drop(look.score, have)
        return self.know(
            replace(point, score=have.score.value, drop=lost, scored_samples=have.samples)
        )

    def keeps(self, point: Point) -> bool:
        """Whether a scored point keeps the promise."""
        assert self.promise and self.float_score and point.drop  # noqa: S101, PT018
        return point.drop.value <= self.promise.limit(self.float_score)

    def know(self, point: Point) -> Point:
        """Keep what is known now in place of what was."""
        self.points = [point if p.name == point.name else p for p in self.points]
        return point


def _bounds(times: Array) -> list[tuple[float, float]]:
    """95 % intervals of the medians over that of the first column: bootstrap over whole rounds."""
    picks = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
    medians = np.stack([np.median(times[rows], axis=0) for rows in picks])
    low, high = np.quantile(medians[:, 1:] / medians[:, :1], (0.025, 0.975), axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Scored points that no other beats in both drop and time, fastest first."""

    def key(point: Point) -> tuple[float, float]:
        return point.time_ratio or math.inf, point.drop.value if point.drop else math.inf

    best: list[Point] = []
    for point in sorted((p for p in points if p.drop), key=key):
        if not best or key(point)[1] < key(best[-1])[1]:
            best.append(point)
    return best


def _noise(reference: Array, candidate: Array) -> float:
    """Power of the difference over the power of the reference."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    power = float((r**2).sum())
    return float(((r - c) ** 2).sum()) / power if power else float(((r - c) ** 2).sum())


def _batch(source: Artifact) -> int:
    first = source.inputs[0].shape[0]
    return first if isinstance(first, int) else 1


def _known(interval: Interval) -> list[float] | None:
    """None where the metric tells none."""
    return None if math.isnan(interval.low) else [interval.low, interval.high]
