"""What an ONNX model is made of: operators, weights, the work by its precision."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.formats import onnx_file, onnx_sizes, onnx_weights
from deploykit.formats.onnx_child import native_nodes
from deploykit.formats.onnx_graph import subgraph_nodes
from deploykit.formats.onnx_macs import COMPUTING, INTEGER, macs
from deploykit.values import Value

if TYPE_CHECKING:
    import onnx

SHORT = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "UINT8": "int8",
    "FLOAT8E4M3FN": "fp8", "FLOAT8E5M2": "fp8", "UINT4": "int4", "UINT16": "int16",
    "FLOAT4E2M1": "fp4",
}  # fmt: skip
NARROW = ("int8", "int4", "int16", "fp8", "fp4", "int2")
"""Precisions that quantization gives."""
PASSED = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that hand on the values they get."""


class Weights(Value):
    """Weights of one dtype."""

    values: int
    bytes: int


class Part(Value):
    """The nodes that compute in one precision."""

    precision: str
    """`int8`; `int4 weights, fp32` where only the weights are narrow."""
    nodes: int
    multiply_accumulates: int
    """Of those nodes whose shapes are known."""


class Anatomy(Value):
    """What one file holds and how much work it is."""

    opset: int
    domains: dict[str, int]
    """Versions of all operator sets by domain, the standard one as `ai.onnx`."""
    ir_version: int
    producer: str
    operators: dict[str, int]
    """Of the main graph, its branches and bodies; another domain's as `domain::Name`."""
    nodes_in_subgraphs: int
    parameters: int
    weights: dict[str, Weights]
    """By dtype as ONNX calls it: initializers, constants and those of branches and bodies."""
    dynamic: dict[str, tuple[str, ...]]
    """Where each dynamic dimension is: `{"batch": ("images:0",)}`."""
    files: dict[str, int]
    """Bytes of each file of weights beside it."""
    native_nodes: tuple[str, ...]
    """Nodes that only native code of others runs: EPContext, custom domains."""
    multiply_accumulates: int
    """Of one run at `shapes`, branches and bodies run once."""
    shapes: dict[str, tuple[int, ...]]
    """The input shapes that the work is counted for."""
    shapes_by: str
    parts: tuple[Part, ...]
    """By work, the largest first."""
    uncounted: dict[str, int]
    """Operators whose work is not in the count."""
    problem: str
    """Why shapes are missing for it; empty where none are."""

    @property
    def quantized(self) -> tuple[int, int]:
        """Compute nodes and multiply-accumulates whose weights or activations are quantized."""
        parts = [part for part in self.parts if part.precision.startswith(NARROW)]
        return sum(p.nodes for p in parts), sum(p.multiply_accumulates for p in parts)


def anatomy(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Anatomy:
    """Take a file apart; its weights are not read where they lie in other files.

    `shapes` are those of inputs to count the work for; else dynamic dimensions get usual sizes.
    Raises InputError: no sound ONNX file, or a shape does not fit an input.
    """
    model = onnx_file.shell(path)
    nodes = [*_all_nodes(model)]
    odd = tuple(native_nodes(model))
    found = onnx_sizes.find(model, onnx_file.inputs(model), shapes or {}, path, run=not odd)
    work, uncounted = _work(nodes, found)
    held = _weights(model)
    return Anatomy(
        opset=onnx_file.opset(model),
        domains={i.domain or "ai.onnx": i.version for i in model.opset_import},
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        operators=dict(Counter(map(_called, nodes)).most_common()),
        nodes_in_subgraphs=sum(1 for n in model.graph.node for _ in subgraph_nodes(n)),
        parameters=sum(each.values for each in held.values()),
        weights=held,
        dynamic=_dynamic(model),
        files={
            name: (path.parent / name).stat().st_size for name in onnx_weights.files(model)
        },
        native_nodes=odd,
        multiply_accumulates=sum(part.multiply_accumulates for part in work),
        shapes=dict(found.shapes),
        shapes_by=found.way,
        parts=work,
        uncounted=uncounted,
        problem=found.problem if uncounted else "",
    )  # fmt: skip


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Of the main graph, branches, bodies, and functions."""
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        yield node
        yield from subgraph_nodes(node)


def _called(node: onnx.NodeProto) -> str:
    standard = node.domain in ("", "ai.onnx")
    return node.op_type if standard else f"{node.domain}::{node.op_type}"


def _weights(model: onnx.ModelProto) -> dict[str, Weights]:
    import onnx

    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for tensor in onnx_weights.tensors(model):
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        count = 1
        for dim in tensor.dims:
            count *= dim
        found[name][0] += count
        found[name][1] += onnx_weights.size_bytes(tensor) if name != "string" else 0
    largest = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: Weights(values=values, bytes=size) for name, (values, size) in largest}


def _dynamic(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for spec in onnx_file.inputs(model):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                found[size].append(f"{spec.name}:{axis}")
    return {name: tuple(places) for name, places in found.items()}


def _work(
    nodes: Sequence[onnx.NodeProto], found: onnx_sizes.Found
) -> tuple[tuple[Part, ...], dict[str, int]]:
    """The computing nodes by precision, and those whose work is not known."""
    makers = {name: node for node in nodes for name in node.output if name}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    uncounted: Counter[str] = Counter()
    for node in nodes:
        if node.op_type == "EPContext":
            uncounted[_called(node)] += 1
        if node.op_type not in COMPUTING:
            continue
        work = macs(node, found.sizes)
        precision = _precision(node, makers, found.types)
        counts[precision][0] += 1
        counts[precision][1] += work or 0
        if work is None:
            uncounted[_called(node)] += 1
    parts = [
        Part(precision=name, nodes=count, multiply_accumulates=work)
        for name, (count, work) in counts.items()
    ]
    ordered = sorted(parts, key=lambda part: (-part.multiply_accumulates, -part.nodes))
    return tuple(ordered), dict(uncounted.most_common())


def _precision(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], types: Mapping[str, str]
) -> str:
    if node.op_type in INTEGER:
        return "int8"
    data = _kept_as(node.input[0], makers, types) if node.input else "unknown"
    if node.op_type == "MatMulNBits":
        bits = next((a.i for a in node.attribute if a.name == "bits"), 4)
        return f"int{bits} weights, {data}"
    weights = _kept_as(node.input[1], makers, types) if len(node.input) > 1 else data
    if weights in (data, "unknown"):
        return data
    if weights in NARROW and data not in NARROW:
        return f"{weights} weights, {data}"
    return weights if data in NARROW else data


def _kept_as(name: str, makers: Mapping[str, onnx.NodeProto], types: Mapping[str, str]) -> str:
    """The precision of a tensor's values: of the integers behind it where it comes from a pair."""
    at = name
    while (maker := makers.get(at)) is not None and maker.op_type in PASSED:
        at = maker.input[0]
    if maker is not None and maker.op_type == "DequantizeLinear":
        name = maker.input[0]
    kind = types.get(name, "unknown")
    return SHORT.get(kind, kind.lower())
