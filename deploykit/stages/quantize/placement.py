"""Which nodes to quantize, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from deploykit.errors import UsageError, did_you_mean
from deploykit.values import Json

if TYPE_CHECKING:
    import onnx

COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
"""Operators that hold nearly all multiply-accumulates."""
FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu"})
"""Activation functions that runtimes fuse into the node before them."""


def excluded(model: onnx.ModelProto, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes that the patterns leave in float. Raises UsageError: one matches none."""
    names = [node.name for node in model.graph.node]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise UsageError(
                f"no node matches {pattern!r}", hint=did_you_mean(pattern, [n for n in names if n])
            )
    return tuple(n for n in names if any(fnmatch(n, pattern) for pattern in patterns))


def float_tensors(model: onnx.ModelProto, op_types: Sequence[str]) -> set[str]:
    """Float32 activations that a node of these types reads or writes."""
    import onnx

    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    floats = {v.name for v in known if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats -= {tensor.name for tensor in model.graph.initializer}
    touched = {
        name
        for node in model.graph.node
        if node.op_type in op_types
        for name in (*node.input, *node.output)
    }
    return floats & touched


def account(model: onnx.ModelProto, source: onnx.ModelProto, left_out: Sequence[str]) -> Json:
    """Facts of a quantized graph: what runs on quantized inputs, what stayed in float and why.

    An activation function between a quantized node and a QuantizeLinear belongs to that node.
    """
    producers = {out: node for node in model.graph.node for out in node.output}
    consumers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.op_type)
    quantized: Counter[str] = Counter()
    kept: list[dict[str, str]] = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        reads = [producers.get(name) for name in node.input[:2] if name]
        inside = bool(reads) and all(p and p.op_type == "DequantizeLinear" for p in reads)
        feeds = [kind for name in node.output for kind in consumers.get(name, [])]
        fused = node.op_type in FUSED and set(feeds) == {"QuantizeLinear"}
        if inside or fused:
            quantized[node.op_type] += 1
        else:
            why = "left out by request" if node.name in left_out else "not quantized by the preset"
            kept.append({"node": node.name, "operator": node.op_type, "reason": why})
    return {
        "quantized_operators": dict(quantized.most_common()),
        "float_nodes": kept,
        "compute_nodes": sum(node.op_type in COMPUTE for node in source.graph.node),
        "compute_nodes_quantized": sum(quantized[op] for op in COMPUTE),
    }
