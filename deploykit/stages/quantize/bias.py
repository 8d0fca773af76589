"""Bias correction: the mean error that rounded weights give each output channel is taken off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from deploykit.formats.onnx_graph import Graph, channel_axis, groups_of, weighed, with_constants
from deploykit.stages.quantize.channels import Channels
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx


def bias_corrected(
    graph: Graph, errors: Mapping[str, Array], channels: Mapping[str, Channels]
) -> Graph | None:
    """A graph whose biases make up for the errors of the weights: E[y] += -error @ E[x], by node.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
    section 4.2, with E[x] as seen on data; that padding brings zeros in at the border is left out
    of account. None where no bias can take it.
    """
    values: dict[tuple[str, int], Array] = {}
    for node in weighed(graph):
        place = _bias_of(graph, node)
        if node.name not in errors or place is None:
            continue
        shift = _shift(node, errors[node.name], channels[node.name].mean)
        name, index = place
        inputs = graph.nodes[name].input
        bias = graph.constant(inputs[index]) if index < len(inputs) and inputs[index] else None
        values[place] = shift if bias is None else bias + shift
    return with_constants(graph, values) if values else None


def _bias_of(graph: Graph, node: onnx.NodeProto) -> tuple[str, int] | None:
    """The constant that is added to each output channel: the node and its input; or None."""
    if node.op_type == "ConvTranspose" or _factor(node, "beta") == 0:
        return None
    if node.op_type != "MatMul":
        given = len(node.input) > 2 and node.input[2]
        return (node.name, 2) if not given or graph.constant(node.input[2]) is not None else None
    add = graph.only_consumer(node.output[0])
    if add is None or add.op_type != "Add":
        return None
    side = next((i for i, name in enumerate(add.input) if graph.constant(name) is not None), None)
    return None if side is None else (add.name, side)


def _shift(node: onnx.NodeProto, error: Array, mean: Array) -> Array:
    """What to add to each channel's bias; `error` is the quantized weights less the true ones."""
    shift: Array
    if node.op_type == "Conv":
        groups = groups_of(node)
        taps = error.reshape(groups, error.shape[0] // groups, error.shape[1], -1).sum(axis=3)
        shift = np.einsum("goi,gi->go", taps, mean.reshape(groups, -1)).reshape(-1)
    else:
        shift = error @ mean if channel_axis(node) == 0 else mean @ error
    return -shift * _factor(node, "alpha") / _factor(node, "beta")


def _factor(node: onnx.NodeProto, name: str) -> float:
    """What a Gemm multiplies its product (alpha) or its bias (beta) by; 1 for other nodes."""
    return next((float(a.f) for a in node.attribute if a.name == name), 1.0)
