"""Layers of the student that follow layers of the teacher, through projections that are learned.

Romero et al. 2015 (arXiv:1412.6550), section 2.2: the mean square of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploykit.errors import InputError, StageError, did_you_mean
from deploykit.stages.distill.lesson import Lesson, Model

if TYPE_CHECKING:
    import torch
    from torch import nn


class Tap:
    """What some layers gave in the last run of a model."""

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        """Raises InputError: no such layer."""
        self._names = names
        self._seen: dict[str, torch.Tensor] = {}
        modules = dict(model.module.named_modules())
        for name in names:
            if name not in modules:
                raise InputError(
                    f"a hint names {name!r}, and the model has no such layer",
                    hint=did_you_mean(name, [n for n in modules if n])
                    if any(modules)
                    else "leave hints out: a model in ONNX has none",
                )
        self._hooks = [
            modules[name].register_forward_hook(lambda *run, name=name: self._note(name, run[-1]))
            for name in names
        ]

    def _note(self, name: str, output: object) -> None:
        import torch

        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.Tensor):
            self._seen[name] = tensor.float()

    def features(self) -> list[torch.Tensor]:
        """Float32, in the order of the names. Raises StageError: a layer has not run."""
        for name in self._names:
            if name not in self._seen:
                raise StageError(
                    f"the layer {name!r} gave no tensor", hint="hint at a layer that runs"
                )
        return [self._seen[name] for name in self._names]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def pairs(hints: Sequence[str]) -> list[tuple[str, str]]:
    """`a=b` to (a, b), `a` to (a, a): layers of the student and of the teacher."""
    parts = [hint.partition("=") for hint in hints]
    return [(student, teacher or student) for student, _, teacher in parts]


def projections(pupil: Model, master: Model, hints: Sequence[str], lesson: Lesson) -> nn.ModuleList:
    """One 1x1 convolution (or linear layer) a hint, from the student's channels to the teacher's.

    Raises InputError: the features differ in more than their channels.
    """
    import torch
    from torch import nn

    found = []
    taps = [Tap(m, [p[i] for p in pairs(hints)]) for i, m in enumerate((pupil, master))]
    with torch.no_grad():
        for model in (pupil, master):
            model.outputs(lesson.rows(slice(2)))
    for name, one, other in zip(hints, *(tap.features() for tap in taps), strict=True):
        axis = 1 if one.ndim == 4 else -1
        shapes = [list(t.shape) for t in (one, other)]
        narrow, wide = (shape.pop(axis) for shape in shapes)
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the hint {name!r}: the student gives {tuple(one.shape)}, the teacher "
                f"{tuple(other.shape)}",
                hint="hint at layers whose outputs differ in channels only",
            )
        make = nn.Conv2d(narrow, wide, 1) if one.ndim == 4 else nn.Linear(narrow, wide)
        found.append(make)
    for tap in taps:
        tap.close()
    return nn.ModuleList(found)


def hint_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean square of the difference, summed over the hints."""
    import torch
    from torch.nn import functional

    pairs = zip(student, teacher, strict=True)
    return torch.stack([functional.mse_loss(s, t) for s, t in pairs]).sum()
