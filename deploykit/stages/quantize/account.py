"""What was quantized, what not and why: by node, by operator, and by multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deploykit.formats.onnx_graph import (
    COMPUTE,
    Graph,
    multiply_accumulates,
    subgraph_nodes,
)
from deploykit.formats.onnx_macs import RECURRENT
from deploykit.stages.quantize.placement import Plan
from deploykit.values import Json

if TYPE_CHECKING:
    import onnx

WORK = (*COMPUTE, *RECURRENT)
"""Operators that hold the work of a model."""
MEASURED = "in float by measurement"
"""Why a node is in float that could be quantized."""


def account(graph: Graph, made: Plan, why: dict[str, str]) -> Json:
    """Facts of a plan. `why` says for nodes left in float what is not plain from their operator."""
    macs = multiply_accumulates(graph.model, graph)
    integer = {name for name, part in made.nodes.items() if part == "integer"}
    float_nodes = [
        {"node": name, "operator": node.op_type, "reason": why.get(name, "not among the operators")}
        for name, node in graph.nodes.items()
        if name not in made.nodes
    ]
    inside = hidden(graph.model)
    return {
        "quantized_operators": dict(
            Counter(graph.nodes[name].op_type for name in made.nodes).most_common()
        ),
        "float_nodes": float_nodes,
        "compute_nodes": sum(n.op_type in WORK for n in graph.nodes.values()) + inside,
        "compute_nodes_quantized": sum(graph.nodes[name].op_type in COMPUTE for name in integer),
        "compute_nodes_in_subgraphs": inside,
        "multiply_accumulates": sum(macs.values()),
        "multiply_accumulates_quantized": sum(macs[name] for name in integer),
    }


def hidden(model: onnx.ModelProto) -> int:
    """Compute nodes, LSTM and GRU inside branches and bodies, where no pair is put."""
    return sum(inner.op_type in WORK for node in model.graph.node for inner in subgraph_nodes(node))
