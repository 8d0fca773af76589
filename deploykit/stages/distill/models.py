"""The models of a training: opened, and what was learned written, each in its own format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.backends import open_session
from deploykit.errors import AnswerIsNo, InputError
from deploykit.formats import onnx_file, onnx_module, onnx_weights, torch_folder
from deploykit.stages.distill.lesson import Lesson, Model
from deploykit.values import Artifact, Json

if TYPE_CHECKING:
    import torch
    from torch import nn

LEAST_AGREEMENT_DB = 20.0
"""Power of the outputs over that of their difference between the engine and what was trained."""
COMPARED = 256
"""Samples on which the two are compared, at most."""


def check(role: str, model: Artifact) -> None:
    """Raises InputError: a model of a format that is not trained, or of a fixed batch."""
    if model.format not in ("torch", "onnx"):
        raise InputError(
            f"{model.path}: the {role} must be a PyTorch or ONNX model, this one is {model.format}",
            hint="distill before the engine is built",
        )
    fixed = [spec for spec in model.inputs if not spec.shape or isinstance(spec.shape[0], int)]
    if model.format == "onnx" and fixed:
        raise InputError(
            f"{model.path}: the batch of {fixed[0]} is fixed, a {role} is run on batches",
            hint="export it with a dynamic batch",
        )


def opened(artifact: Artifact) -> Model:
    """Load a model; weights with the channels last train faster on a processor."""
    import torch

    if artifact.format == "onnx":
        model = Model(onnx_module.load(artifact.path), artifact.inputs)
    else:
        sparse = torch_folder.describe(artifact.path).sparse
        model = Model(torch_folder.load(artifact), artifact.inputs, sparse)
    if all(parameter.ndim <= 4 for parameter in model.module.parameters()):
        _arrange(model.module, torch.channels_last)
    return model


def write(pupil: Model, student: Artifact, path: Path, lesson: Lesson) -> Json:
    """Write what the student has become, and what there is to tell of it.

    Raises AnswerIsNo: ONNX Runtime computes something else than was trained.
    """
    import torch

    _arrange(pupil.module, torch.contiguous_format)
    if student.format == "onnx":
        return _write_onnx(pupil, student, path, lesson)
    description = torch_folder.describe(student.path)
    torch_folder.write(
        pupil.module,
        description,
        torch_folder.factory_file(student.path, description),
        path,
        torch_folder.own_examples(student.path),
    )
    return {}


def _write_onnx(pupil: Model, student: Artifact, path: Path, lesson: Lesson) -> Json:
    onnx_weights.write(onnx_module.write(pupil.module, student.path), path)
    onnx_file.shell(path)
    some = lesson.rows(slice(COMPARED))
    pupil.module.eval()
    want = [tensor.numpy() for tensor in pupil.all_outputs(some, COMPARED)]
    feed = {name: tensor.numpy() for name, tensor in some.inputs.items()}
    engine = student.model_copy(update={"path": path, "weights": (), "history": ()})
    with open_session(engine, "ort-cpu") as session:
        have = list(session.run(feed).values())
    agreement = min(_decibels(a, b) for a, b in zip(want, have, strict=True))
    if agreement < LEAST_AGREEMENT_DB:
        raise AnswerIsNo(
            f"ONNX Runtime differs from what was trained: {agreement:.1f} dB, at least "
            f"{LEAST_AGREEMENT_DB:.0f} dB are wanted",
            hint="quantize for this processor, or lower the learning rate",
        )
    return {
        "engine_agreement_db": round(agreement, 2),
        "engine_same_argmax": float((want[0].argmax(-1) == have[0].argmax(-1)).mean()),
        "engine_compared_samples": len(some),
    }


def _decibels(want: np.ndarray, have: np.ndarray) -> float:
    """Signal to noise; capped where they are equal."""
    noise = float(np.square(want.astype(np.float64) - have).sum())
    signal = float(np.square(want.astype(np.float64)).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, signal * 1e-20, 1e-50)))


def _arrange(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights out in memory, in place."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
