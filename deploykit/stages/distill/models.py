"""The models of a training: opened, and what was learned written, each in its own format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.backends import open_session
from deploykit.environment import has_int8_dot_product
from deploykit.errors import AnswerIsNo, InputError
from deploykit.formats import onnx_file, onnx_module, onnx_weights, torch_folder
from deploykit.metrics import sqnr_db
from deploykit.stages.distill.lesson import Lesson, Model
from deploykit.values import Artifact, Json, SessionOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

LEAST_AGREEMENT_DB = 20.0
"""Signal to noise between ONNX Runtime and PyTorch, on the same model."""
EQUAL_DB = 200.0
"""Told where they are equal."""
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


def prove(model: Model, artifact: Artifact, lesson: Lesson) -> Json:
    """Hold a model in ONNX, as PyTorch runs it here, against ONNX Runtime on the first samples.

    Where this processor sums 8-bit products in 16 bits the runtime computes as the file says.
    Raises AnswerIsNo: they differ.
    """
    if artifact.format != "onnx":
        return {}
    some = lesson.rows(slice(COMPARED))
    model.module.eval()
    mine = [tensor.numpy() for tensor in model.all_outputs(some, COMPARED)]
    feed = {name: tensor.numpy() for name, tensor in some.inputs.items()}
    options = SessionOptions(simulate=not has_int8_dot_product())
    with open_session(artifact, "ort-cpu", options) as session:
        theirs = list(session.run(feed).values())
    agreement = min(sqnr_db(a, b) for a, b in zip(theirs, mine, strict=True))
    if not agreement >= LEAST_AGREEMENT_DB:
        raise AnswerIsNo(
            f"{artifact.path}: PyTorch and ONNX Runtime differ on it: {agreement:.1f} dB, at least "
            f"{LEAST_AGREEMENT_DB:.0f} dB are wanted",
            hint="train the PyTorch model before the export",
        )
    return {
        "engine_agreement_db": round(min(agreement, EQUAL_DB), 2),
        "engine_same_argmax": float((mine[0].argmax(-1) == theirs[0].argmax(-1)).mean()),
        "engine_compared_samples": len(some),
        "engine_simulated": options.simulate,
    }


def _write_onnx(pupil: Model, student: Artifact, path: Path, lesson: Lesson) -> Json:
    onnx_weights.write(onnx_module.write(pupil.module, student.path), path)
    onnx_file.shell(path)
    written = student.model_copy(update={"path": path, "weights": (), "history": ()})
    return prove(pupil, written, lesson)


def _arrange(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights out in memory, in place."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
