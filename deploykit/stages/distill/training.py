"""The training: each epoch follows from the seed, its number and the state it began with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import evaluation
from deploykit.errors import StageError
from deploykit.stages.distill import checkpoint, hints, losses
from deploykit.stages.distill.checkpoint import State
from deploykit.stages.distill.crew import Crew
from deploykit.stages.distill.lesson import Lesson, Model, augmentation
from deploykit.stages.distill.options import DistillOptions
from deploykit.values import Json

if TYPE_CHECKING:
    import torch
    from torch import nn

MOMENTUM, WARM_UP, FIRST, LAST = 0.9, 0.15, 1 / 25, 1 / 25e4
"""Of the rate: the share of steps in which it rises, and where it begins and ends by the peak."""
Progress = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and a text, a few times a second."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a training is kept, and of which job it is."""

    path: Path
    key: str


def rate(step: int, total: int, peak: float) -> float:
    """The learning rate of a step: a cosine up, then one down.

    Smith 2018 (arXiv:1803.09820), as `torch.optim.lr_scheduler.OneCycleLR` has it.
    """
    top = WARM_UP * total - 1
    if step <= top:
        begin, end, way = peak * FIRST, peak, step / top
    else:
        begin, end, way = peak, peak * LAST, (step - top) / (total - 1 - top)
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * way))


class Training:
    """A student, its teachers, and what is learned on the way."""

    def __init__(
        self, pupil: Model, masters: Sequence[Model], lesson: Lesson, options: DistillOptions,
        crew: Crew,
    ) -> None:  # fmt: skip
        """Raises InputError: hints, loss or augmentation do not fit."""
        self.pupil, self._masters, self._options, self._crew = pupil, masters, options, crew
        self._lesson, self._held_back = _split(lesson, options)
        self._loss, self._augment = losses.make(options), augmentation(options.augment)
        self._beside = hints.projections(pupil, masters[0], options.hints, lesson)
        self._zeros = pupil.zeros()
        pairs = hints.pairs(options.hints)
        self._taps = [
            hints.Tap(m, [p[i] for p in pairs]) for i, m in enumerate((pupil, masters[0]))
        ]
        self._runner = crew.together(_Runner(pupil, self._taps[0], self._beside))
        self._optimizer = _optimizer(self._runner, options)
        self._mean: State = {}
        self._best: State = {}
        self._soft: tuple[torch.Tensor, ...] | None = None
        self.size = min(options.batch_size, len(self._lesson))
        self.steps = len(self._lesson) // self.size
        """Of an epoch; the rest waits for the next one: one alone breaks batch norm."""

    def run(self, place: Place, tell: Progress) -> Json:
        """Train, from the checkpoint on if there is one; the pupil ends with what is kept.

        Raises StageError: the loss is not finite.
        """
        import torch

        done = self._resumed(place)
        began_with = done.epochs
        for epoch in range(done.epochs, self._options.epochs):
            if self._stale(done.scores):
                break
            began = time.monotonic()
            loss = self._epoch(epoch, place, tell)
            scores = (*done.scores, self._score()) if self._held_back else ()
            done = checkpoint.Progress(
                epochs=epoch + 1,
                losses=(*done.losses, loss),
                scores=scores,
                seconds=(*done.seconds, time.monotonic() - began),
            )
            if scores and scores[-1] > max(scores[:-1], default=-math.inf):
                self._best = {k: v.detach().clone() for k, v in self._kept().items()}
            if self._crew.rank == 0 and epoch + 1 < self._options.epochs:
                checkpoint.save(place.path, place.key, done, self._state())
        _put(self.pupil.module, self._best or self._kept())
        for tap in self._taps:
            tap.close()
        found: Json = {
            "loss_per_epoch": [round(loss, 6) for loss in done.losses],
            "steps": self.steps * done.epochs,
            "samples_seen": self.steps * done.epochs * self.size,
            "seconds_per_epoch": [round(s, 3) for s in done.seconds],
            "threads": torch.get_num_threads(),
            "processes": self._crew.size,
        }
        if began_with:
            found["resumed_after_epoch"] = began_with
        if done.scores:
            best = max(done.scores)
            found["score_per_epoch"] = list(done.scores)
            found["best_epoch"] = done.scores.index(best) + 1
        return found

    def _epoch(self, epoch: int, place: Place, tell: Progress) -> float:
        """Train for an epoch; returns its mean loss."""
        import torch

        options, total = self._options, self.steps * self._options.epochs
        rng = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        torch.manual_seed(options.seed * 1_000_003 + epoch)  # dropout draws from it
        self._runner.train()
        sums = torch.zeros(())
        for number, (batch, soft) in enumerate(self._batches(rng)):
            step = epoch * self.steps + number
            for group in self._optimizer.param_groups:
                group["lr"] = rate(step, total, options.learning_rate)
            loss = self._step(batch, soft)
            if not math.isfinite(loss):
                kept = f"; what it was after epoch {epoch} is kept in {place.path}" if epoch else ""
                raise StageError(
                    f"the loss is {loss} at step {step + 1} of {total}{kept}",
                    hint=f"lower the learning rate ({options.learning_rate}), or give --clip 1",
                )
            sums += loss
            tell(step + 1, total, f"epoch {epoch + 1}, loss {loss:.3f}")
        return float(self._crew.mean(sums)) / self.steps

    def _batches(
        self, rng: torch.Generator
    ) -> Iterator[tuple[Lesson, tuple[torch.Tensor, ...] | None]]:
        """Batches of this process in a new order, with the teacher's outputs where they stay."""
        import torch

        lesson = self._lesson
        order = torch.randperm(len(lesson), generator=rng)
        if not self._augment and not self._options.hints and self._soft is None:
            self._soft = self._taught(lesson)
        for start in range(0, self.steps * self.size, self.size):
            rows = order[start : start + self.size]
            mine = self._crew.share(torch.arange(len(rows)))
            batch = lesson.rows(rows)
            if self._augment:
                batch = self._augment(batch, rng)
            soft = None if self._soft is None else tuple(t[rows[mine]] for t in self._soft)
            yield batch.rows(mine), soft

    def _step(self, batch: Lesson, soft: tuple[torch.Tensor, ...] | None) -> float:
        """One step of the optimizer; returns the loss before it."""
        import torch

        options = self._options
        soft = soft or self._taught(batch)
        with self._products():
            outputs, features = self._runner(batch)
        loss = self._loss(outputs, soft, batch.target)
        if options.hints:
            taught = self._taps[1].features()
            loss = loss + options.hint_weight * hints.hint_loss(features, taught)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if options.clip:
            torch.nn.utils.clip_grad_norm_(self._runner.parameters(), options.clip)
        self._optimizer.step()
        for parameter, masked in self._zeros:
            parameter.data.masked_fill_(masked, 0.0)
        self._average()
        return loss.item()

    def _taught(self, lesson: Lesson) -> tuple[torch.Tensor, ...]:
        """The mean of the teachers' outputs."""
        import torch

        with torch.no_grad(), self._products():
            every = [master.all_outputs(lesson, self.size) for master in self._masters]
        return tuple(torch.stack(each).mean(0) for each in zip(*every, strict=True))

    def _products(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self._options.precision == "bf16")

    def _average(self) -> None:
        """Move the mean of the weights (Polyak and Juditsky 1992, with exponential decay)."""
        decay = self._options.ema
        if decay is None:
            return
        now = self.pupil.module.state_dict()
        if not self._mean:
            self._mean = {k: v.detach().clone() for k, v in now.items()}
        for name, value in now.items():
            if value.is_floating_point():
                self._mean[name].lerp_(value, 1 - decay)
            else:
                self._mean[name].copy_(value)

    def _kept(self) -> State:
        return self._mean or self.pupil.module.state_dict()

    def _score(self) -> float:
        """The score of what would be kept, on the data held back."""
        assert self._held_back is not None  # noqa: S101 - asked only then
        now = {k: v.detach().clone() for k, v in self.pupil.module.state_dict().items()}
        _put(self.pupil.module, self._kept())
        self.pupil.module.eval()
        pairs = (self.pupil.all_outputs(self._held_back, self.size), self._taught(self._held_back))
        mine, theirs = ({f"{i}": t.numpy() for i, t in enumerate(each)} for each in pairs)
        _put(self.pupil.module, now)
        target = self._held_back.target
        labels = None if target is None else target.numpy()
        found = evaluation.score(mine, labels, self._options.metric, reference=theirs)
        return float(self._crew.told(found.score.value))

    def _stale(self, scores: Sequence[float]) -> bool:
        patience = self._options.patience
        if patience is None or not scores:
            return False
        return len(scores) - 1 - scores.index(max(scores)) >= patience

    def _state(self) -> State:
        """All that the next epoch follows from."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {
            "student": self.pupil.module.state_dict(),
            "beside": self._beside.state_dict(),
            "mean": self._mean,
            "best": self._best,
        }
        for number, state in self._optimizer.state_dict()["state"].items():
            parts[f"optimizer.{number}"] = state
        return {f"{part}/{k}": v for part, each in parts.items() for k, v in each.items()}

    def _resumed(self, place: Place) -> checkpoint.Progress:
        """Take up a checkpoint of the same job; all processes read the same file."""
        found = self._crew.told(checkpoint.load(place.path, place.key))
        if found is None:
            return checkpoint.Progress()
        progress, tensors = found
        parts: dict[str, State] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        _put(self.pupil.module, parts["student"])
        self._beside.load_state_dict(parts.get("beside", {}))
        self._mean, self._best = parts.get("mean", {}), parts.get("best", {})
        plain = self._optimizer.state_dict()
        plain["state"] = {
            int(part.partition(".")[2]): state
            for part, state in parts.items()
            if part.startswith("optimizer.")
        }
        self._optimizer.load_state_dict(plain)
        return progress


def _runner_class() -> type[nn.Module]:
    from torch import nn

    class Runner(nn.Module):
        """The student with what is learned beside it, as one module: so gradients are shared."""

        def __init__(self, pupil: Model, tap: hints.Tap, beside: nn.ModuleList) -> None:
            super().__init__()
            self.module, self.beside = pupil.module, beside
            self._pupil, self._tap = pupil, tap

        def forward(self, batch: Lesson) -> tuple[Any, list[torch.Tensor]]:
            outputs = self._pupil.outputs(batch)
            pairs = zip(self.beside, self._tap.features(), strict=True)
            return outputs, [project(feature).float() for project, feature in pairs]

    return Runner


def _Runner(pupil: Model, tap: hints.Tap, beside: nn.ModuleList) -> nn.Module:  # noqa: N802
    return _runner_class()(pupil, tap, beside)


def _split(lesson: Lesson, options: DistillOptions) -> tuple[Lesson, Lesson | None]:
    """What is learned from, and each twentieth sample where a score is watched."""
    import torch

    if options.patience is None:
        return lesson, None
    apart = torch.arange(len(lesson)) % 20 == 19
    if not apart.any():
        raise StageError(
            f"{len(lesson)} samples are too few to hold some back", hint="leave patience out"
        )
    return lesson.rows((~apart).nonzero()[:, 0]), lesson.rows(apart.nonzero()[:, 0])


def _optimizer(module: nn.Module, options: DistillOptions) -> torch.optim.Optimizer:
    import torch

    trained = [p for p in module.parameters() if p.requires_grad]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, options.learning_rate, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        trained,
        options.learning_rate,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=options.weight_decay,
    )


def _put(module: nn.Module, state: State) -> None:
    """Copy values into a module, in place: shared weights and the optimizer keep their tensors."""
    import torch

    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
