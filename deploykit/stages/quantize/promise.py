"""A promise: how much of a score may be lost, and how that is checked."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.dataset import Dataset, picked
from deploykit.errors import UsageError
from deploykit.evaluation import Outputs, collect, evaluate, metric_identity, score
from deploykit.metrics import LIKE_ITSELF, METRICS, UP_TO_ONE
from deploykit.session import Session
from deploykit.store import digest_of
from deploykit.values import Score

EVERY, FEWEST_LOOKED_AT = 8, 64
"""A candidate is scored on one in 8 samples first, where those are so many."""
CONFIDENCE = 0.999
"""With which a first look must say that a promise is broken for the other samples to be spared;
for each candidate by itself."""


@dataclass(frozen=True)
class Promise:
    """How much of a score may be lost, and on which data that is checked."""

    data: Dataset
    metric: str
    max_drop: float
    relative: bool = False
    """`max_drop` is a share of the float model's score, not units of the metric."""

    def __post_init__(self) -> None:
        """Raises UsageError: a drop that allows everything, or from infinity."""
        if self.metric in LIKE_ITSELF:
            raise UsageError(
                f"{self.metric} of the float model is infinite: no drop from it can be allowed",
                hint="take another metric, such as cosine or agreement",
            )
        if self.max_drop >= 1 and (self.relative or self.metric in UP_TO_ONE):
            raise UsageError(
                f"a drop of {self.max_drop:.3g}{' times the score' * self.relative} allows any "
                f"{self.metric}: there is no more to lose",
                hint="write 0.005 for half a point of a score from 0 to 1, or 1% of the score",
            )

    @property
    def digest(self) -> str:
        """Of everything that decides whether it is kept."""
        terms = [self.data.digest, metric_identity(self.metric), self.max_drop, self.relative]
        return digest_of({"terms": terms})

    def limit(self, reference: Score) -> float:
        """The drop allowed, in units of the metric."""
        return self.max_drop * abs(reference.score.value) if self.relative else self.max_drop


@dataclass(frozen=True)
class Look:
    """Data to score on, and what the float model does on it."""

    data: Dataset
    outputs: Outputs
    score: Score

    def at(self, session: Session, metric: str) -> Score:
        """The score of a candidate."""
        return evaluate(session, self.data, metric, reference=self.outputs, batch_size=1)


def looks(session: Session, promise: Promise) -> list[Look]:
    """All of the evaluation data, and before it a part, if that can be enough to say no."""
    outputs, targets = collect(session, promise.data, batch_size=1)
    whole = score(outputs, targets, promise.metric, reference=outputs)
    found = [Look(promise.data, outputs, whole)]
    rows = picked(len(promise.data), EVERY)
    part = promise.data.split(EVERY)[1]
    if promise.metric in METRICS and len(part) >= FEWEST_LOOKED_AT:
        some = {name: array[rows] for name, array in outputs.items()}
        labels = None if targets is None else targets[rows]
        first = score(some, labels, promise.metric, reference=some)
        found.insert(0, Look(part, some, first))
    return found
