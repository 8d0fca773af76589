"""Static INT8 quantization to explicit Q/DQ pairs, with real calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from deploykit import store
from deploykit.backends import open_session
from deploykit.dataset import Dataset, padded
from deploykit.errors import AnswerIsNo, InputError, StageError, UsageError, did_you_mean
from deploykit.formats import onnx_file
from deploykit.stages.quantize import _ort_quantizer
from deploykit.stages.quantize.placement import account, excluded, float_tensors
from deploykit.stages.quantize.presets import Preset, Target, preset
from deploykit.stages.quantize.ranges import Progress, Ranges, observe
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, Value

if TYPE_CHECKING:
    import onnx

__all__ = ["Preset", "QuantizeOptions", "preset", "quantize"]

LIBRARIES = ("onnx", "onnxruntime", "onnxruntime-gpu")
HUGE = 1e4
"""A range beyond this leaves almost no levels for ordinary values."""


class QuantizeOptions(Value):
    """How to quantize."""

    target: Target = Field(default="ort-cpu", description="the runtime that the INT8 file is for")
    op_types_to_quantize: tuple[str, ...] = Field(
        default=(), description="operator types to quantize; by default all that can be"
    )
    nodes_to_exclude: tuple[str, ...] = Field(
        default=(), description="patterns of node names to leave in float"
    )
    calibration_samples: int = Field(
        default=0, ge=0, description="use the first N samples of the calibration data; 0 for all"
    )
    calibration_batch_size: int = Field(default=32, ge=1, description="samples run at a time")


def quantize(
    source: Artifact,
    options: QuantizeOptions,
    *,
    data: Dataset,
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Calibrate on `data` (minmax) and write an INT8 model with explicit Q/DQ pairs.

    Activations are quantized per tensor, weights per channel, as the target's preset says. Raises
    InputError: the data does not fit, or a tensor is not finite on it. StageError: the result does
    not load. AnswerIsNo: nothing that computes could be quantized.
    """
    if source.format != "onnx":
        raise InputError(
            f"{source.path} is {source.format}, quantize takes an ONNX model",
            hint="export it first",
        )
    if source.precision == "int8":
        raise InputError(f"{source.path} is quantized already", hint="give the float model")
    bound = data.matching(source.inputs)
    if options.calibration_samples:
        bound = bound.first(options.calibration_samples)
    chosen = preset(options.target)

    def work(path: Path) -> Made:
        import onnx

        model, facts = _quantized(source, options, chosen, bound, progress)
        onnx.save(model, path)
        _check(path, source, bound)
        return Made(
            format="onnx",
            precision="int8",
            inputs=source.inputs,
            outputs=source.outputs,
            facts=facts,
            preprocessing=bound.preprocessing,
        )

    others = {"calibration": bound.digest, "preset": store.digest_of(chosen.model_dump())}
    job = Job(stage="quantize", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _quantized(
    source: Artifact,
    options: QuantizeOptions,
    chosen: Preset,
    data: Dataset,
    progress: Progress | None,
) -> tuple[onnx.ModelProto, Json]:
    onnx_file.read(source.path)  # a broken file is told apart from a tool that fails on it
    model, way = _ort_quantizer.prepare(source.path)
    op_types = _op_types(options.op_types_to_quantize, chosen)
    left_out = excluded(model, options.nodes_to_exclude)
    batch = source.inputs[0].shape[0]
    tensors = float_tensors(model, op_types)
    if not tensors:
        raise _nothing(0)
    ranges = observe(
        model,
        tensors,
        data,
        batch_size=batch if isinstance(batch, int) else options.calibration_batch_size,
        progress=progress,
    )
    for spec in source.inputs:
        if spec.name in ranges and ranges[spec.name][0] == ranges[spec.name][1]:
            raise InputError(
                f"input {spec.name!r} is {ranges[spec.name][0]} in all of {data.reference}",
                hint="calibrate on real data: a constant input tells nothing about the ranges",
            )
    result = _ort_quantizer.insert_qdq(model, ranges, chosen, op_types=op_types, left_out=left_out)
    facts = account(result, model, left_out)
    if not facts["compute_nodes_quantized"]:
        raise _nothing(facts["compute_nodes"])
    return result, {
        **facts,
        "preset": chosen.model_dump(),
        "calibration_method": "minmax",
        "calibration_samples": len(data),
        "calibration_data": Path(data.reference).name,
        "prepared": way,
        "huge_ranges": _huge(ranges),
        "ranges": {name: list(bounds) for name, bounds in ranges.items()},
    }


def _nothing(nodes: int) -> AnswerIsNo:
    return AnswerIsNo(
        f"0 of {nodes} Conv, MatMul and Gemm nodes could be quantized",
        hint="the work of this model lies in operators or subgraphs that stay in float",
    )


def _op_types(asked: tuple[str, ...], chosen: Preset) -> tuple[str, ...]:
    known = _ort_quantizer.default_op_types()
    for name in asked:
        if name not in known:
            raise UsageError(
                f"operator type {name!r} cannot be quantized", hint=did_you_mean(name, known)
            )
    return asked or chosen.op_types or known


def _huge(ranges: Ranges) -> list[str]:
    return [name for name, (low, high) in ranges.items() if max(abs(low), abs(high)) > HUGE]


def _check(path: Path, source: Artifact, data: Dataset) -> None:
    """Load and run the result. Raises StageError: it does not load, or gives NaN."""
    onnx_file.read(path)
    artifact = source.model_copy(update={"path": path, "precision": "int8"})
    batch = source.inputs[0].shape[0]
    size = batch if isinstance(batch, int) else 1
    feed, _ = next(data.batches(size))
    feed = {name: padded(array, size) for name, array in feed.items()}
    with open_session(artifact, "ort-cpu") as session:
        for name, array in session.run(feed).items():
            if not np.isfinite(array).all():
                raise StageError(
                    f"output {name!r} of the quantized model has NaN or infinite values",
                    hint="leave the nodes with huge ranges out with --nodes-to-exclude",
                )
