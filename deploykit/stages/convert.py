"""Rewrite an ONNX model from anywhere: a newer opset, simplified, in FP16 or BF16; and prove it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deploykit import store
from deploykit._lazy import installed
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError
from deploykit.formats import onnx_file, onnx_lift, onnx_lower, onnx_weights
from deploykit.formats.onnx_graph import Graph, matches, multiply_accumulates, name_nodes
from deploykit.formats.onnx_lower import Half, Slots
from deploykit.stages._convert_lab import Lab, Talk, loss
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, Precision, Value

if TYPE_CHECKING:
    import onnx

LIBRARIES = ("onnx", "onnxslim", "onnxruntime", "onnxruntime-gpu")
QUANTIZED = frozenset({"int8", "fp8", "int4"})
OPSETS = {"fp32": 13, "fp16": 13, "bf16": 22}
"""The lowest that has the operators in the type: those of Conv are there in BF16 from 22 on."""
HALF_SCALES = 19
"""The lowest whose Q/DQ pairs have scales of 16 bits."""
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
SAMPLES = 32


class ConvertOptions(Value):
    """How to convert."""

    precision: Literal["fp32", "fp16", "bf16"] = Field(
        description="fp16, bf16, or fp32: the same numbers in a newer opset, simplified"
    )
    keep_float: tuple[str, ...] = Field(
        default=(), description="patterns of nodes or modules to leave in float32"
    )
    tolerance: float = Field(
        default=0.0,
        ge=0,
        description="largest |difference| of an output, over its largest value; 0 for 0.01 in "
        "fp16, 0.05 in bf16 and 0.00001 in fp32",
    )
    opset: int = Field(default=0, ge=0, description="lowest opset of the result; 0: as needed")
    simplify: bool = Field(
        default=True, description="simplify the graph with onnxslim if the result is proven equal"
    )


def convert(
    source: Artifact,
    options: ConvertOptions,
    *,
    data: Dataset,
    out: Path,
    force: bool = False,
    talk: Talk | None = None,
) -> Artifact:
    """Write the model in another precision, its inputs and outputs as they are.

    Nodes that overflow on `data`, or cost an output more than the tolerance, stay in float32; the
    facts list them. Raises InputError: no ONNX model, one that is 16-bit already, or an output is
    NaN on the data. AnswerIsNo: nothing that computes can be lowered, or the result is off.
    """
    if source.format != "onnx":
        raise InputError(
            f"{source.path} is {source.format}, convert takes an ONNX model",
            hint="export it first",
        )
    if source.precision in ("fp16", "bf16"):
        raise InputError(
            f"{source.path} is {source.precision} already", hint="give the float32 model"
        )
    bound = data.matching(source.inputs).first(SAMPLES)

    def work(path: Path) -> Made:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            lab = Lab(source, bound, Path(folder), talk or _silent)
            return _made(lab, options, path)

    job = Job(
        stage="convert", source=source, options=options, others={"data": bound.digest},
        libraries=LIBRARIES,
    )  # fmt: skip
    return store.produce(job, work, out=out, force=force)


def _silent(text: str, done: int, total: int) -> None:
    del text, done, total


def _made(lab: Lab, options: ConvertOptions, path: Path) -> Made:
    """Write the converted model at `path`, proven."""
    source = lab.source
    _ = lab.reference  # is it sound on the data at all?
    model, told = _adopted(lab, options)
    name_nodes(model)
    graph, facts = Graph(model), Json()
    quantized = source.precision in QUANTIZED
    precision: Precision = source.precision if quantized else options.precision
    if options.precision != "fp32":
        model, facts = _lowered(lab, graph, options)
    weights = onnx_weights.write(model, path, folder=source.path.parent)
    made = onnx_file.shell(path)
    artifact = source.model_copy(
        update={"path": path, "precision": precision, "weights": weights, "history": ()}
    )
    return Made(
        format="onnx",
        precision=precision,
        inputs=onnx_file.inputs(made),
        outputs=onnx_file.outputs(made),
        weights=weights,
        facts={
            "prepared": told,
            "opset": onnx_file.opset(made),
            "operators": onnx_file.operators(made),
            "parameters": onnx_file.parameters(made),
            **facts,
            **_proof(lab, artifact, options, facts.get("simulated_difference")),
        },
    )


def _adopted(lab: Lab, options: ConvertOptions) -> tuple[onnx.ModelProto, list[str]]:
    """The model lifted, its shapes inferred, and simplified where that is proven equal."""
    path, kind = lab.source.path, options.precision
    model = onnx_file.shell(path)
    pairs = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    least = max(OPSETS[kind], options.opset, HALF_SCALES if pairs and kind != "fp32" else 0)
    model, told = onnx_lift.lift(model, least, path)
    onnx_lower.constants_out(model)
    if options.simplify:
        model, how = _simplified(lab, model)
        told.append(how)
    model, who = onnx_lift.infer(model)
    return model, [*told, who]


def _simplified(lab: Lab, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The model by onnxslim if it gives the same outputs on the data, and what became of it."""
    if lab.source.precision in QUANTIZED:
        return model, "not simplified: quantized weights would be folded into floats"
    if lab.source.weights:
        return model, "not simplified: its weights lie in another file"
    if not installed("onnxslim"):
        return model, "not simplified: onnxslim is not installed"
    import onnxslim

    before = len(model.graph.node)
    path = lab.scratch / "simplified.onnx"
    try:
        slim = onnxslim.slim(type(model).FromString(model.SerializeToString()))
        onnx_weights.write(slim, path)
        lost, name = loss(lab.reference, lab.outputs(lab.source.model_copy(update={"path": path})))
    except Exception as error:  # noqa: BLE001 - it raises many kinds, and is optional
        return model, f"not simplified: onnxslim fails on it: {onnx_file.line(error)}"
    if lost > TOLERANCES["fp32"]:
        return model, f"not simplified: onnxslim changes output {name!r} by {lost:.1e}"
    return onnx_file.shell(
        path
    ), f"simplified by onnxslim: {before} to {len(slim.graph.node)} nodes"


def _lowered(lab: Lab, graph: Graph, options: ConvertOptions) -> tuple[onnx.ModelProto, Json]:
    """The model with all nodes in the type that keep the tolerance so, and the account of it."""
    assert options.precision != "fp32"  # noqa: S101
    kind: Half = options.precision
    found = onnx_lower.slots(graph, kind, onnx_file.opset(graph.model))
    able = {name: slot for name, slot in found.items() if isinstance(slot, Slots)}
    why = {name: slot for name, slot in found.items() if isinstance(slot, str)}
    for name in [n for n in able if any(matches(graph.nodes[n], p) for p in options.keep_float)]:
        why[name] = "left in float32 by request"
        del able[name]
    tolerance, simulated = options.tolerance or TOLERANCES[kind], 0.0
    if able:
        _keep(able, why, lab.overflowing(graph, able, kind))
    if able:
        kept, simulated = lab.lossy(graph, able, kind, tolerance)
        _keep(able, why, kept)
    work = multiply_accumulates(graph.model, graph)
    lowered, total = sum(work[name] for name in able), sum(work.values())
    if not able or (total and not lowered):
        raise AnswerIsNo(
            f"0 of {total:,} multiply-accumulates can be in {kind.upper()}: "
            f"{next(iter(why.values()), 'nothing in it is float32')}",
            hint="the model stays in float32",
        )
    return onnx_lower.lower(graph, able, kind, lab.source.path.parent), {
        "nodes_lowered": len(able),
        "multiply_accumulates": total,
        "multiply_accumulates_lowered": lowered,
        "float_nodes": [
            {"node": name, "operator": graph.nodes[name].op_type, "reason": why[name]}
            for name in graph.nodes
            if name in why
        ],
        "simulated_difference": simulated,
    }


def _keep(able: dict[str, Slots], why: dict[str, str], kept: Mapping[str, str]) -> None:
    """Move nodes from those that can be lowered to those that stay."""
    for name, reason in kept.items():
        del able[name]
        why[name] = reason


def _proof(lab: Lab, artifact: Artifact, options: ConvertOptions, simulated: float | None) -> Json:
    """Run the written model beside the source. Raises AnswerIsNo: an output is off."""
    kind = options.precision
    tolerance = options.tolerance or TOLERANCES[kind]
    facts: Json = {
        "verified_on": Path(lab.data.reference).name,
        "verified_samples": len(lab.data),
        "tolerance": tolerance,
    }
    try:
        lost, name = loss(lab.reference, lab.outputs(artifact))
    except InputError as error:
        if kind != "bf16" or simulated is None:
            raise
        why = str(error).removeprefix(f"{artifact.path}: ")
        return {
            **facts,
            "verified_by": f"simulation ({why})",
            "largest_relative_difference": simulated,
        }
    if lost > tolerance:
        raise AnswerIsNo(
            f"output {name!r} is off by {lost:.2g} of its largest value, {tolerance:.2g} allowed",
            hint="raise --tolerance only if the model is still good: see `deploykit evaluate`",
        )
    return {**facts, "verified_by": "ort-cpu", "largest_relative_difference": lost}
