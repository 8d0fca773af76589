"""Embedding tables as integers: one scale a row, and only the rows looked up become float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploykit.formats.onnx_graph import Graph
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

HUGE = 1e4
"""A value beyond this leaves its row no levels for ordinary ones."""
LARGE = 1 << 16
"""Fewest values of a table: the smaller ones are not worth two more nodes."""


def unfit(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Why a Gather cannot read integers, or None."""
    table = graph.constant(node.input[0])
    if table is None or table.ndim != 2 or any(a.name == "axis" and a.i for a in node.attribute):
        return "it looks up no rows of a constant float32 table"
    if not np.abs(table).max() <= HUGE:  # NaN too
        return "its table holds masks or infinite values"
    if table.size < LARGE:
        return f"its table has {table.size:,} values, integers pay from {LARGE:,} on"
    return None


def quantized(table: Array) -> tuple[Array, Array]:
    """int8 rows [rows, values], and their float32 scales [rows, 1]: the largest becomes 127."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.where(largest > np.finfo(np.float32).tiny * 127, largest / 127, 1).astype(np.float32)
    return np.rint(table / scale).astype(np.int8), scale


def lookup(node: onnx.NodeProto, integers: str, scales: str, tag: str) -> list[onnx.NodeProto]:
    """Nodes that look up the rows and their scales, and multiply them.

    A DequantizeLinear of the table would make all of it float in memory; behind the lookup none
    can be, since each row has a scale of its own.
    """
    import onnx

    make, name, ids, result = onnx.helper.make_node, node.name, node.input[1], node.output[0]
    rows, row_scales = f"{result}{tag}_rows", f"{result}{tag}_row_scales"
    floats = f"{result}{tag}_float_rows"
    return [
        make("Gather", [integers, ids], [rows], name),
        make("Gather", [scales, ids], [row_scales], f"{name}_Scales"),
        make("Cast", [rows], [floats], f"{name}_Cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [floats, row_scales], [result], f"{name}_Mul"),
    ]
