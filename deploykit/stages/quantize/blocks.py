"""4-bit weights in blocks: which nodes take them, and the levels and scales of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from deploykit.formats.onnx_graph import Graph
from deploykit.stages.quantize.levels import INT4
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

BLOCK = 32
"""Weights of one output that share a scale. 64 and 128 lose 1 and 2 dB more."""
LARGE = 1 << 16
"""Fewest weights of a node: below this ONNX Runtime is slower with 4 bits than in float."""
SHARES = np.linspace(1.0, 0.65, 8)
"""Shares of a block's largest weight that its highest level may stand for."""

AS_MAX = "written as Max with zero: ONNX Runtime fuses no 4-bit weights with a Relu behind them"


def unfit(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Why a node cannot have 4-bit weights, or None."""
    if node.op_type not in ("MatMul", "Gemm"):
        return "4-bit weights are for MatMul and Gemm"
    weights = graph.constant(node.input[1])
    if weights is None or weights.ndim != 2:
        return "its second operand is no float32 matrix that is constant"
    if weights.size < LARGE:
        return f"it has {weights.size:,} weights, 4 bits pay from {LARGE:,} on"
    inputs = weights.shape[1 if turned(node) else 0]
    if inputs % BLOCK:
        return f"its {inputs:,} inputs are no multiple of the block, {BLOCK}"
    if (behind := _activation(graph, node)) is not None and behind.op_type == "Clip":
        return f"ONNX Runtime does not fuse 4-bit weights with {behind.name!r} behind them"
    return None


def relus(graph: Graph, names: Iterable[str]) -> set[str]:
    """Names of the Relus behind the named nodes: each must be written as Max with zero.

    ONNX Runtime takes a product with a Relu or Clip behind it, or behind its bias, for something
    to compute on integers, and then unpacks the weights at every run: five times slower than float.
    """
    behind = [_activation(graph, graph.nodes[name]) for name in names]
    return {node.name for node in behind if node is not None and node.op_type == "Relu"}


def _activation(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    follower = graph.only_consumer(node.output[0])
    if follower is not None and follower.op_type == "Add":
        follower = graph.only_consumer(follower.output[0])
    return follower if follower is not None and follower.op_type in ("Relu", "Clip") else None


def turned(node: onnx.NodeProto) -> bool:
    """Whether the weights are stored with the outputs first."""
    return any(a.name == "transB" and a.i for a in node.attribute)


def turn(node: onnx.NodeProto) -> None:
    """Let a Gemm take its weights with the inputs first: ONNX Runtime fuses no other."""
    for attribute in node.attribute:
        if attribute.name == "transB":
            attribute.i = 0


def quantized(weights: Array) -> tuple[Array, Array]:
    """int4 levels of weights [inputs, outputs], and float32 scales [inputs / BLOCK, outputs].

    Each block takes the scale, of those for SHARES of its largest weight, with the least squared
    error: one dB better than the largest weight's own.
    """
    blocks = weights.astype(np.float32).reshape(-1, BLOCK, weights.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    largest = np.where(largest > np.finfo(np.float32).tiny * INT4.highest * 2, largest, 1)
    best = np.full(largest.shape, np.inf, np.float32)
    scale = np.empty_like(best)
    for share in SHARES.astype(np.float32):
        tried = largest * (share / INT4.highest)
        error = ((INT4.nearest(blocks / tried) * tried - blocks) ** 2).sum(axis=1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
    levels = INT4.nearest(blocks / scale).reshape(weights.shape)
    return levels.astype(INT4.dtype), scale[:, 0]
