"""What a student learns from: models, and the data in memory with its checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploykit._code import load_function
from deploykit.dataset import Dataset
from deploykit.errors import InputError, UsageError
from deploykit.formats import torch_module
from deploykit.stages.distill.options import DistillOptions
from deploykit.values import Array, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Lesson:
    """Samples in memory, or a batch of them."""

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def rows(self, rows: torch.Tensor | slice) -> Lesson:
        """Samples by number."""
        picked = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Lesson(picked, None if self.target is None else self.target[rows])


@dataclass(frozen=True, slots=True)
class Model:
    """A module, called with a lesson."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    sparse: tuple[str, ...] = ()
    """Parameters whose zeros stay zero."""

    def zeros(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The sparse parameters, each with where it is zero now."""
        found = [self.module.get_parameter(name) for name in self.sparse]
        return [(parameter, parameter.detach() == 0) for parameter in found]

    def outputs(self, batch: Lesson) -> tuple[torch.Tensor, ...]:
        """All outputs, in float32."""
        tensors = [batch.inputs[spec.name] for spec in self.inputs]
        called = torch_module.call(self.module, self.inputs, tensors)
        return tuple(t.float() for t in torch_module.output_tensors(called))

    def all_outputs(self, lesson: Lesson, size: int) -> tuple[torch.Tensor, ...]:
        """The outputs for all samples, without gradients, in batches of `size`."""
        import torch

        with torch.no_grad():
            starts = range(0, len(lesson), size)
            parts = [self.outputs(lesson.rows(slice(i, i + size))) for i in starts]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def read(data: Dataset, options: DistillOptions) -> Lesson:
    """Read all data into memory, with the labels where the loss takes them.

    Raises InputError: the data does not fit `data.inputs`, or the labels are not what the loss
    takes. UsageError: labels are wanted and there are none.
    """
    import torch

    batches = list(data.batches(1024))
    inputs = {
        spec.name: torch.from_numpy(np.concatenate([feed[spec.name] for feed, _ in batches]))
        for spec in data.inputs
    }
    found = [target for _, target in batches if target is not None]
    if options.labels:
        target = _labels(found, data.reference, options)
        return Lesson(inputs, torch.from_numpy(target))
    if ":" in options.loss and found:  # a user's own loss knows what its labels are
        return Lesson(inputs, torch.from_numpy(np.concatenate(found)))
    return Lesson(inputs, None)


def _labels(found: list[Array], reference: str, options: DistillOptions) -> Array:
    if not found:
        raise UsageError(
            f"{reference} has no labels ('target'), and "
            + ("the loss dkd" if options.loss == "dkd" else "alpha below 1")
            + " needs them",
            hint="set alpha to 1 to learn from the teacher alone (with kd or mse), or add an array "
            "'target'",
        )
    target = np.concatenate(found)
    if options.loss == "mse":
        return target.astype(np.float32)
    if target.dtype.kind not in "iu" or target.ndim != 1:
        raise InputError(
            f"{reference}: 'target' is {target.dtype} of {target.ndim} axes",
            hint="give one class number for each sample",
        )
    return target.astype(np.int64)


def check(pupil: Model, masters: Sequence[Model], lesson: Lesson, loss: str) -> None:
    """Compare the outputs of all models on two samples. Raises InputError."""
    import torch

    with torch.no_grad():
        two = lesson.rows(slice(2))
        shapes, *others = (
            [tuple(t.shape) for t in model.outputs(two)] for model in (pupil, *masters)
        )
    alike = 1 if loss in ("kd", "dkd", "cosine") else len(shapes)
    for theirs in [] if ":" in loss or loss == "relation" else others:
        if theirs[:alike] != shapes[:alike]:
            raise InputError(
                f"the first output of the student is {shapes[0]}, of the teacher {theirs[0]}"
                if theirs[0] != shapes[0]
                else f"the outputs of the student are {shapes}, of the teacher {theirs}",
                hint="give a teacher with the outputs of the student, or a loss of your own",
            )
    if any(theirs != others[0] for theirs in others):
        raise InputError(f"the teachers differ in outputs: {others}", hint="give alike teachers")
    if loss in ("kd", "dkd"):
        _check_classes(shapes[0], lesson.target)
    elif loss == "mse" and lesson.target is not None:
        given = tuple(lesson.target.shape[1:])
        if given != shapes[0][1:]:
            raise InputError(
                f"'target' is {given} a sample, the first output {shapes[0][1:]}",
                hint="give a target for each number of the output, or set alpha to 1",
            )


def _check_classes(shape: tuple[int, ...], target: torch.Tensor | None) -> None:
    if len(shape) != 2:
        raise InputError(
            f"the first output is {shape}, this loss takes logits [sample, class]",
            hint="put the logits first, or take the loss mse",
        )
    labels = set() if target is None else set(target.tolist())
    if unknown := labels - set(range(shape[1])):
        raise InputError(
            f"the label {min(unknown)} is no class of a model with {shape[1]} outputs",
            hint="number the classes from 0",
        )


Augment = Callable[[Lesson, "torch.Generator"], Lesson]


def augmentation(reference: str | None) -> Augment | None:
    """The user's function, as one of lessons. Raises InputError: it gives something else."""
    if reference is None:
        return None
    function = load_function(reference)

    def augment(batch: Lesson, rng: torch.Generator) -> Lesson:
        try:
            made = function(dict(batch.inputs), rng)
            inputs = {name: made[name] for name in batch.inputs}
            shapes = {name: (t.shape, t.dtype) for name, t in inputs.items()}
        except Exception as error:
            raise InputError(
                f"the augmentation {reference} raises {type(error).__name__}: {error}",
                hint="it is called with (inputs by name, generator) and returns inputs by name",
            ) from error
        if shapes != {name: (t.shape, t.dtype) for name, t in batch.inputs.items()}:
            raise InputError(
                f"the augmentation {reference} gives other shapes or dtypes: {shapes}",
                hint="return tensors like those it was given",
            )
        return Lesson(inputs, batch.target)

    return augment
