"""What a student learns from: models, and the data in memory with its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploykit.dataset import Dataset
from deploykit.errors import InputError, UsageError
from deploykit.formats import torch_folder, torch_module
from deploykit.values import Array, Artifact, TensorSpec

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

    def logits(self, batch: Lesson) -> torch.Tensor:
        """The first output."""
        tensors = [batch.inputs[spec.name] for spec in self.inputs]
        return torch_module.output_tensors(torch_module.call(self.module, self.inputs, tensors))[0]

    def all_logits(self, lesson: Lesson, size: int) -> torch.Tensor:
        """The first output for all samples, without gradients, in batches of `size`."""
        import torch

        with torch.no_grad():
            starts = range(0, len(lesson), size)
            return torch.cat([self.logits(lesson.rows(slice(i, i + size))) for i in starts])


def opened(artifact: Artifact) -> Model:
    """Load a model; weights with the channels last train faster on a processor."""
    import torch

    sparse = torch_folder.describe(artifact.path).sparse
    model = Model(torch_folder.load(artifact), artifact.inputs, sparse)
    if all(parameter.ndim <= 4 for parameter in model.module.parameters()):
        arrange(model.module, torch.channels_last)
    return model


def arrange(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights out in memory, in place."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]


def read(data: Dataset, *, labels: bool) -> Lesson:
    """Read all data into memory, with the labels or without.

    Raises InputError: the data does not fit `data.inputs`, or the labels are no class numbers.
    UsageError: labels are wanted and there are none.
    """
    import torch

    batches = list(data.batches(1024))
    inputs = {
        spec.name: torch.from_numpy(np.concatenate([feed[spec.name] for feed, _ in batches]))
        for spec in data.inputs
    }
    if not labels:
        return Lesson(inputs, None)
    target = _labels([target for _, target in batches], data.reference)
    return Lesson(inputs, torch.from_numpy(target))


def _labels(parts: list[Array | None], reference: str) -> Array:
    found = [part for part in parts if part is not None]
    if not found:
        raise UsageError(
            f"{reference} has no labels ('target'), and alpha below 1 needs them",
            hint="set alpha to 1 to learn from the teacher alone, or add an array 'target'",
        )
    target = np.concatenate(found)
    if target.dtype.kind not in "iu" or target.ndim != 1:
        raise InputError(
            f"{reference}: 'target' is {target.dtype} of {target.ndim} axes",
            hint="give one class number for each sample",
        )
    return target.astype(np.int64)


def check(pupil: Model, master: Model, lesson: Lesson) -> None:
    """Compare the outputs of both models on two samples. Raises InputError."""
    import torch

    with torch.no_grad():
        two = lesson.rows(slice(2))
        shapes = [tuple(model.logits(two).shape) for model in (pupil, master)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the first output of the student is {shapes[0]}, of the teacher {shapes[1]}",
            hint="give a teacher with the classes of the student",
        )
    if len(shapes[0]) != 2:
        raise InputError(
            f"the first output is {shapes[0]}, distillation takes logits [sample, class]",
            hint="put the logits first",
        )
    labels = set() if lesson.target is None else set(lesson.target.tolist())
    if unknown := labels - set(range(shapes[0][1])):
        raise InputError(
            f"the label {min(unknown)} is no class of a model with {shapes[0][1]} outputs",
            hint="number the classes from 0",
        )
