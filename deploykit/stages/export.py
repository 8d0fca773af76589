"""Export a torch artifact to ONNX, and prove it against PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from deploykit import store
from deploykit._lazy import needs
from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.formats import onnx_file, torch_folder, torch_module
from deploykit.metrics import differences
from deploykit.store import Job, Made
from deploykit.values import Array, Artifact, Difference, Feed, Json, TensorSpec, Value

if TYPE_CHECKING:
    from torch import nn

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
        module = torch_folder.load(source)
        inputs = source.inputs if options.dynamic_batch else _fixed_batch(source.inputs)
        _export(module, inputs, source.outputs, options.opset, path)
        made = _described(path, inputs)
        return made.model_copy(
            update={
                "facts": {**made.facts, **_proof(module, made, path, options, bound)},
                "preprocessing": bound.preprocessing if bound else None,
            }
        )

    others = {"data": bound.digest} if bound else {}
    job = Job(stage="export", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


PRIVATE = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
"""What the exporter tells of a node that holds paths and internals."""


def _fixed_batch(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(s.model_copy(update={"shape": (1, *s.shape[1:])}) for s in inputs)


def _export(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    opset: int,
    path: Path,
) -> None:
    with needs("torch"):
        import torch
    with needs("onnxscript"):
        import onnxscript  # noqa: F401 - the exporter imports it
    dynamic = tuple(
        {axis: name for axis, name in enumerate(spec.shape) if isinstance(name, str)}
        for spec in inputs
    )
    example = torch_module.examples(inputs, batch=2)
    try:
        with _quiet():
            torch.onnx.export(
                module,
                example,
                str(path),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=dynamic if any(dynamic) else None,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        raise StageError(
            f"the exporter fails: {_reason(error)}",
            hint="rewrite what it names, or export a part; --traceback shows all of it",
        ) from error
    _strip(path)


def _strip(path: Path) -> None:
    """Take out where on this machine the model's source lies: it goes to no server.

    What says which module a node is from stays.
    """
    import onnx

    model = onnx.load(path)
    for part in (model.graph, *model.functions):
        for node in part.node:
            kept = [p for p in node.metadata_props if p.key not in PRIVATE]
            if len(kept) < len(node.metadata_props):
                del node.metadata_props[:]
                node.metadata_props.extend(kept)
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings: its result is compared with the model instead."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _described(path: Path, wanted: tuple[TensorSpec, ...]) -> Made:
    """What was exported. Raises StageError: its inputs are not the ones wanted."""
    model = onnx_file.read(path)
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


def _proof(
    module: nn.Module, made: Made, path: Path, options: ExportOptions, data: Dataset | None
) -> Json:
    """Facts of the comparison with PyTorch. Raises AnswerIsNo: beyond the tolerance."""
    plain: dict[str, Any] = made.model_dump(include={"format", "precision", "inputs", "outputs"})
    artifact = Artifact(path=path, sha256="", **plain)
    sizes = options.verify_batch_sizes if options.dynamic_batch else (1,)
    worst: list[Difference] = []
    names = [spec.name for spec in made.outputs]
    with open_session(artifact, "ort-cpu") as session:
        for size in sizes:
            feed = _feed(made.inputs, size, data)
            want = torch_module.run(module, made.inputs, feed)
            found = differences(dict(zip(names, want, strict=True)), session.run(feed))
            worst.append(max(found, key=lambda d: d.max_relative))
    for size, gap in zip(sizes, worst, strict=True):
        if not gap.max_relative <= options.tolerance:  # also true for NaN
            raise AnswerIsNo(
                f"output {gap.output!r} differs from PyTorch at batch size {size}: "
                f"{gap.max_relative:.2e} of its largest value, allowed {options.tolerance:.0e}",
                hint="`deploykit compare` shows more; raise --tolerance only if that is enough",
            )
    return {
        "verified_batch_sizes": list(sizes),
        "verified_on": Path(data.reference).name if data else "random inputs",
        "largest_relative_difference": max(gap.max_relative for gap in worst),
    }


def _feed(inputs: tuple[TensorSpec, ...], size: int, data: Dataset | None) -> Feed:
    if data is None:
        tensors = torch_module.examples(inputs, batch=size, seed=size)
        return {s.name: t.numpy() for s, t in zip(inputs, tensors, strict=True)}
    feed, _ = next(data.batches(size))
    return {name: _padded(array, size) for name, array in feed.items()}


def _padded(array: Array, size: int) -> Array:
    """Repeat samples up to `size`, for data smaller than a batch."""
    return array[np.arange(size) % len(array)]
