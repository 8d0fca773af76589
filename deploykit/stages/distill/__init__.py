"""Distill: a student learns from teachers' outputs, and from the labels where there are any."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploykit import _files, environment, evaluation, store
from deploykit._code import load_function
from deploykit._lazy import needs
from deploykit.dataset import Dataset
from deploykit.errors import UsageError
from deploykit.stages.distill import checkpoint, models
from deploykit.stages.distill.crew import Crew, joined
from deploykit.stages.distill.lesson import check, read
from deploykit.stages.distill.losses import kd_loss
from deploykit.stages.distill.options import DistillOptions
from deploykit.stages.distill.training import Place, Progress, Training
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json

__all__ = ["DistillOptions", "distill", "kd_loss", "paced"]

LIBRARIES = ("torch",)


def distill(  # noqa: PLR0913 - a teacher and data beside what every stage takes
    student: Artifact,
    options: DistillOptions,
    *,
    teacher: Artifact | Sequence[Artifact],
    data: Dataset,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train the weights of `student` to give what `teacher` gives on `data`; its shape stays.

    So do the zeros of a model whose single weights were pruned. Several teachers teach the mean of
    their outputs. After each epoch but the last the training is kept beside `out`; the same job
    goes on from there. Under `torchrun` all processes share each batch, and the first one writes.

    A student in ONNX is trained as the engine computes it: what is quantized in it stays quantized,
    with scales that are learned (quantization-aware training), and goes back into the same graph.

    Raises InputError: a model is neither PyTorch nor ONNX, or holds what cannot be trained, the
    data does not fit, or the outputs of the models differ in shape. UsageError: no labels, and
    alpha below 1. StageError: the loss is no longer finite; the last checkpoint is kept.
    ResourceError: the disk is full. AnswerIsNo: ONNX Runtime computes something else than PyTorch
    here, before the training or after it.
    """
    teachers = (teacher,) if isinstance(teacher, Artifact) else tuple(teacher)
    if not teachers:
        raise UsageError("there is no teacher", hint="give at least one")
    for role, model in (("student", student), *(("teacher", t) for t in teachers)):
        models.check(role, model)
        data.matching(model.inputs)
    others = _others(teachers, data, options)
    job = Job(stage="distill", source=student, options=options, others=others, libraries=LIBRARIES)
    place = Place(checkpoint.path_for(out), job.key)
    course = _Course(student, teachers, data.matching(student.inputs), options)
    tell = paced(progress or _silent)
    with joined() as crew:

        def work(folder: Path) -> Made:
            facts = course.held(crew, place, tell, folder)
            return Made(
                format=student.format,
                precision=student.precision,
                inputs=student.inputs,
                outputs=student.outputs,
                facts={**facts, **others},
                preprocessing=data.preprocessing,
            )

        if not crew.told(store.find(out, job.key)) and crew.rank:
            course.held(crew, place, tell, None)
        if not crew.rank:
            store.produce(job, work, out=out, force=force)
            _files.remove(place.path)
        crew.told(None)  # the others wait until it is written
    made = store.find(out, job.key)
    assert made is not None  # noqa: S101 - it has just been written
    return made


def _others(teachers: Sequence[Artifact], data: Dataset, options: DistillOptions) -> dict[str, str]:
    """Digests of what goes in beside the student."""
    names = ["teacher", *(f"teacher_{n}" for n in range(2, len(teachers) + 1))]
    found = {name: t.sha256 for name, t in zip(names, teachers, strict=True)}
    found["data"] = data.digest
    for role in ("loss", "augment", "metric"):
        reference = getattr(options, role) or ""
        if ":" in reference:
            load_function(reference)  # it is there
            found[role] = evaluation.metric_identity(reference)
    return found


@dataclass(frozen=True, slots=True)
class _Course:
    """Who learns what from whom."""

    student: Artifact
    teachers: tuple[Artifact, ...]
    data: Dataset
    options: DistillOptions

    def held(self, crew: Crew, place: Place, tell: Progress, out: Path | None) -> Json:
        """Train, and write the student at `out` if it is given; returns the facts."""
        with _reproducible(self.options):
            pupil, *masters = map(models.opened, (self.student, *self.teachers))
            lesson = read(self.data, self.options)
            check(pupil, masters, lesson, self.options.loss)
            for model, artifact in zip(
                (pupil, *masters), (self.student, *self.teachers), strict=True
            ):
                models.prove(model, artifact, lesson)  # before the hours that a training may take
            facts = Training(pupil, masters, lesson, self.options, crew).run(place, tell)
            if out:
                facts |= models.write(pupil, self.student, out, lesson)
        return facts


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
