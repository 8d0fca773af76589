"""Distill: a student learns from a teacher's outputs, and from the labels where there are any."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from deploykit import environment, store
from deploykit._lazy import needs
from deploykit.dataset import Dataset
from deploykit.errors import InputError, StageError
from deploykit.formats import torch_folder
from deploykit.stages.distill.lesson import (
    Lesson,
    Model,
    arrange,
    check,
    opened,
    read,
)
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, Value

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch",)
MOMENTUM, WARM_UP = 0.9, 0.15
Progress = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and a text, a few times a second."""


class DistillOptions(Value):
    """How the student learns: stochastic gradient descent with a one-cycle learning rate."""

    temperature: float = Field(default=4.0, gt=0, description="divides the logits before softmax")
    alpha: float = Field(
        default=0.7, ge=0, le=1, description="weight of the teacher; the labels have the rest"
    )
    epochs: int = Field(default=2, ge=1, description="passes over the data")
    learning_rate: float = Field(
        default=0.05, gt=0, description="peak, after a warm-up of 15 % of the steps"
    )
    batch_size: int = Field(default=128, ge=1, description="samples in a step")
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 penalty on all parameters")
    seed: int = Field(default=0, ge=0, description="of the order of the data and of dropout")
    threads: int | None = Field(
        default=None, ge=1, description="processor threads; all allowed cores by default"
    )


def distill(  # noqa: PLR0913 - a teacher and data beside what every stage takes
    student: Artifact,
    options: DistillOptions,
    *,
    teacher: Artifact,
    data: Dataset,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train the weights of `student` to give what `teacher` gives on `data`; its shape stays.

    So do the zeros of a model whose single weights were pruned.

    Raises InputError: a model is no torch artifact, the data does not fit, or the outputs of the
    two differ in shape. UsageError: no labels, and alpha below 1. StageError: the loss is no longer
    finite.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if model.format != "torch":
            raise InputError(
                f"{model.path}: the {role} must be a PyTorch model, this one is {model.format}",
                hint="distill before the export",
            )
        data.matching(model.inputs)
    bound = data.matching(student.inputs)

    def work(folder: Path) -> Made:
        import torch

        with _reproducible(options):
            pupil, master = opened(student), opened(teacher)
            lesson = read(bound, labels=options.alpha < 1)
            check(pupil, master, lesson)
            facts = _train(pupil, master, lesson, options, paced(progress or _silent))
            description = torch_folder.describe(student.path)
            source = torch_folder.factory_file(student.path, description)
            arrange(pupil.module, torch.contiguous_format)
            own = torch_folder.own_examples(student.path)
            torch_folder.write(pupil.module, description, source, folder, own)
        return Made(
            format="torch",
            precision=student.precision,
            inputs=student.inputs,
            outputs=student.outputs,
            facts={**facts, "teacher": teacher.sha256, "data": data.digest},
            preprocessing=data.preprocessing,
        )

    others = {"teacher": teacher.sha256, "data": data.digest}
    job = Job(stage="distill", source=student, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor | None,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Sum of alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) and (1 - alpha) CE(target).

    Logits are float [sample, class], targets int64 [sample] or None (then there is no second part);
    the result is a scalar, the mean over the samples. Hinton, Vinyals and Dean 2015
    (arXiv:1503.02531), section 2: T^2 keeps the gradients of both parts at the same size.
    """
    from torch.nn import functional

    soft = functional.kl_div(
        functional.log_softmax(student_logits / temperature, 1),
        functional.log_softmax(teacher_logits / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft
    if target is None:
        return loss
    return loss + (1 - alpha) * functional.cross_entropy(student_logits, target)


def paced(
    progress: Progress, interval_s: float = 0.3, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Pass on a call if `interval_s` has gone by since the last one, and the final call."""
    last = -math.inf

    def call(step: int, total: int, text: str) -> None:
        nonlocal last
        now = clock()
        if step == total or now - last >= interval_s:
            last = now
            progress(step, total, text)

    return call


def _silent(step: int, total: int, text: str) -> None:
    """Nobody asked."""


@contextmanager
def _reproducible(options: DistillOptions) -> Iterator[None]:
    """Fix threads and the global generator (dropout draws from it); both come back as they were."""
    with needs("torch"):
        import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or environment.read().cores)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _train(
    pupil: Model, master: Model, lesson: Lesson, options: DistillOptions, progress: Progress
) -> Json:
    """Train the pupil in place. Raises StageError: the loss is not finite."""
    import torch

    size = min(options.batch_size, len(lesson))
    steps = len(lesson) // size  # the rest waits for the next epoch: one alone breaks batch norm
    total = steps * options.epochs
    learn = _learner(pupil, options, total)
    losses: list[float] = []
    marks = [time.monotonic()]
    for epoch, batch, soft in _batches(lesson, master, options, size):
        hard = pupil.logits(batch)
        losses.append(learn(kd_loss(hard, soft, batch.target, options.temperature, options.alpha)))
        marks.append(time.monotonic())
        if not math.isfinite(losses[-1]):
            raise StageError(
                f"the loss is {losses[-1]} at step {len(losses)} of {total}",
                hint=f"lower the learning rate ({options.learning_rate})",
            )
        progress(len(losses), total, f"epoch {epoch + 1}, loss {losses[-1]:.3f}")
    by_epoch = (options.epochs, steps)
    return {
        "loss_per_epoch": np.reshape(losses, by_epoch).mean(1).round(6).tolist(),
        "steps": total,
        "samples_seen": total * size,
        "seconds_per_epoch": np.diff(marks).reshape(by_epoch).sum(1).round(3).tolist(),
        "threads": torch.get_num_threads(),
    }


def _batches(
    lesson: Lesson, master: Model, options: DistillOptions, size: int
) -> Iterator[tuple[int, Lesson, torch.Tensor]]:
    """Epoch, batch and the teacher's logits: each epoch in a new order, the teacher runs once.

    What does not fill a batch is left out of its epoch.
    """
    import torch

    rng = torch.Generator().manual_seed(options.seed)
    soft = master.all_logits(lesson, size)
    for epoch in range(options.epochs):
        order = torch.randperm(len(lesson), generator=rng)
        for start in range(0, len(lesson) - size + 1, size):
            rows = order[start : start + size]
            yield epoch, lesson.rows(rows), soft[rows]


def _learner(pupil: Model, options: DistillOptions, total: int) -> Callable[[torch.Tensor], float]:
    """SGD with Nesterov momentum under a one-cycle learning rate (Smith 2018, arXiv:1803.09820)."""
    import torch

    optimizer = torch.optim.SGD(
        pupil.module.train().parameters(),
        options.learning_rate,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=options.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total, pct_start=WARM_UP, cycle_momentum=False
    )

    zeros = pupil.zeros()

    def step(loss: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for parameter, masked in zeros:
            parameter.data.masked_fill_(masked, 0.0)
        schedule.step()
        return loss.item()

    return step
