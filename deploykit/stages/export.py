"""Export a torch artifact to ONNX, and prove it against PyTorch."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deploykit import store
from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.formats import onnx_file, program_file, torch_folder, torch_module
from deploykit.stages._export_deviation import first_deviation
from deploykit.stages._export_program import capture, to_onnx
from deploykit.stages._export_proof import Check, Feeds, Mismatch, Taken, answers, checks, prove
from deploykit.store import Job, Made
from deploykit.values import Array, Artifact, Dimension, Feed, TensorSpec, Value

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

Specs = tuple[TensorSpec, ...]
Dimensions = tuple[Dimension, ...]
Traced = Callable[[Path], "tuple[nn.Module, ExportedProgram, tuple[str, ...]]"]
"""Exports to a path: the module, its decomposed program, and the files of weights."""
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


class ExportOptions(Value):
    """How to export."""

    opset: int = Field(default=20, ge=17, description="version of the ONNX operator set")
    dynamic_batch: bool = Field(
        default=True, description="leave the number of samples open; else it is fixed at 1"
    )
    verify_batch_sizes: tuple[int, ...] = Field(
        default=(1, 2, 7, 32), description="batch sizes at which ONNX and PyTorch are compared"
    )
    tolerance: float = Field(
        default=1e-4, gt=0, description="largest |difference| allowed, over the largest |output|"
    )


def export(
    source: Artifact,
    options: ExportOptions,
    *,
    out: Path,
    data: Dataset | None = None,
    force: bool = False,
) -> Artifact:
    """Export with torch's dynamo exporter; compare with PyTorch at several batch sizes.

    The comparison runs on `data` where it is given; else on random inputs, and the facts say so.
    Raises StageError: the exporter fails, or fixed a dimension that should be dynamic. AnswerIsNo:
    the outputs differ by more than the tolerance.
    """
    if source.format != "torch":
        raise InputError(
            f"{source.path} is {source.format}, export takes a torch model",
            hint="give file.py:factory or a torch artifact folder",
        )
    bound = data.matching(source.inputs) if data else None

    def work(path: Path) -> Made:
        inputs, dimensions = source.inputs, torch_folder.describe(source.path).every_dimension
        if not options.dynamic_batch:
            inputs, dimensions = _at_one(inputs, dimensions)
        todo = checks(inputs, dimensions, options.verify_batch_sizes)
        feeds = Feeds(inputs, bound, source.path)

        def traced(path: Path) -> tuple[nn.Module, ExportedProgram, tuple[str, ...]]:
            module = torch_folder.load(source)
            program = _program(module, source.path, inputs, dimensions)
            return module, *to_onnx(program, inputs, source.outputs, options.opset, path)

        def exported() -> tuple[Made, list[Taken]]:
            """PyTorch's part of it: after this, no module is held."""
            module, _, weights = traced(path)
            made = _described(path, inputs, weights)
            return made, _answers(module, made, todo, feeds)

        made, taken = exported()
        gc.collect()  # a program is full of cycles, and holds the weights
        try:
            with open_session(_artifact(made, path), "ort-cpu") as session:
                proof = prove(session, taken, options.tolerance)
        except Mismatch as error:
            raise AnswerIsNo(
                f"{error}; {_deviation(traced, made, path, error, options)}", hint=error.hint
            ) from error
        facts = {
            **made.facts,
            "verified_on": Path(data.reference).name if data else "random inputs",
            **proof,
        }
        return made.model_copy(
            update={
                "facts": facts,
                "preprocessing": bound.preprocessing if bound else None,
            }
        )

    others = {"data": bound.digest} if bound else {}
    job = Job(stage="export", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _at_one(inputs: Specs, dimensions: Dimensions) -> tuple[Specs, Dimensions]:
    """Inputs of one sample, and the dimensions that stay dynamic."""
    first = {spec.shape[0] for spec in inputs}
    fixed = tuple(s.model_copy(update={"shape": (1, *s.shape[1:])}) for s in inputs)
    return fixed, tuple(d for d in dimensions if d.name not in first)


def _program(
    module: nn.Module, folder: Path, inputs: Specs, dimensions: Dimensions
) -> ExportedProgram:
    if torch_folder.describe(folder).factory == torch_folder.PROGRAM:
        return program_file.read(folder / torch_folder.PROGRAM)
    # torch takes a size of 1 for a constant
    sizes = {d.name: d.nearest(max(2, d.usual)) for d in dimensions}
    example = torch_folder.probe(folder, inputs=inputs, sizes=sizes)
    return capture(module, inputs, dimensions, example)


def _deviation(
    traced: Traced, made: Made, path: Path, error: Mismatch, options: ExportOptions
) -> str:
    """Where the two part; the model is traced again for that, into a folder that goes."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        module, program, _ = traced(Path(folder) / path.name)
    try:
        return first_deviation(
            module, program, _artifact(made, path), error.feed, options.tolerance
        )
    except Exception as failed:  # noqa: BLE001 - the answer is no whatever becomes of the search
        reason = (str(failed).splitlines() or [type(failed).__name__])[0]
        return f"which module differs was not found: {reason}"


def _described(path: Path, wanted: tuple[TensorSpec, ...], weights: tuple[str, ...]) -> Made:
    """What was exported. Raises StageError: its inputs are not the ones wanted."""
    model = onnx_file.shell(path)
    got = {spec.name: spec for spec in onnx_file.inputs(model)}
    for spec in wanted:
        have = got.get(spec.name)
        if have is None or not _same_dims(spec, have):
            raise StageError(
                f"exported {have or 'nothing'} where {spec} was asked for",
                hint="the model fixes a dimension (a size taken as a number?) or drops an input",
            )
    return Made(
        format="onnx",
        precision=onnx_file.precision(model),
        inputs=wanted,
        outputs=onnx_file.outputs(model),
        weights=weights,
        facts={
            "opset": onnx_file.opset(model),
            "operators": onnx_file.operators(model),
            "parameters": onnx_file.parameters(model),
        },
    )


def _same_dims(wanted: TensorSpec, have: TensorSpec) -> bool:
    pairs = zip(wanted.shape, have.shape, strict=True)
    return len(wanted.shape) == len(have.shape) and all(
        isinstance(a, str) == isinstance(b, str) and (isinstance(a, str) or a == b)
        for a, b in pairs
    )


def _answers(module: nn.Module, made: Made, todo: Sequence[Check], feeds: Feeds) -> list[Taken]:
    """PyTorch's own outputs at all sizes. Raises as `answers`."""
    names = [spec.name for spec in made.outputs]

    def reference(feed: Feed) -> dict[str, Array]:
        found = torch_module.run(module, made.inputs, feed)
        return dict(zip(names, found, strict=True))

    return answers(reference, todo, feeds)


def _artifact(made: Made, path: Path) -> Artifact:
    plain: dict[str, Any] = made.model_dump(
        include={"format", "precision", "inputs", "outputs", "weights"}
    )
    return Artifact(path=path, sha256="", **plain)
