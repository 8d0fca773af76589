"""Adaptive rounding: weights rounded up or down so that the layer's output changes least.

The aim is that of AdaRound (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
Quantization", section 3): the least squared error of the output, not of the weights. It is
reached without training, as in GPTQ (Frantar et al. 2023, algorithm 1): column by column, and what
rounding one column costs is made good by the columns that are still free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deploykit._lazy import needs
from deploykit.dataset import Dataset
from deploykit.formats.onnx_graph import Graph, channel_axis, groups_of, weighed
from deploykit.stages.quantize.calibration import runs
from deploykit.stages.quantize.channels import FEW
from deploykit.stages.quantize.levels import Levels
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

COLUMNS = 4096
"""Input vectors of a layer that are looked at, over all samples."""
LARGEST = 4608
"""Layers with more inputs to an output are rounded to nearest: their matrices would not fit."""
AT_ONCE = 1 << 26
"""Elements of the matrices that are kept at a time."""
BLOCK = 64
"""Columns whose errors are handed on to the rest together."""
DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""


def adaptive(
    graph: Graph, scales: Mapping[str, Array], levels: Levels, data: Dataset
) -> dict[str, Array]:
    """Integer weights by node, for the nodes that have `scales` and a form that is known here.

    `scales` are those of the output channels, shape (outputs,) or (). Convolutions other than
    two-dimensional ones are left out, and so are layers with too many inputs.
    """
    nodes = [node for node in weighed(graph) if node.name in scales and _known(graph, node)]
    found: dict[str, Array] = {}
    for part in _parts(graph, nodes):
        moments = _moments(graph, part, data.first(FEW))
        for node in part:
            rows = _rows(node, _weights(graph, node))
            scale = np.broadcast_to(scales[node.name], rows.shape[0] * rows.shape[1])
            scale = scale.reshape(*rows.shape[:2], 1)
            integers = np.stack(
                [
                    _rounded(w / s, h, levels)
                    for w, s, h in zip(rows, scale, moments[node.name], strict=True)
                ]
            )
            found[node.name] = _unrows(node, integers, _weights(graph, node).shape)
    return found


def _weights(graph: Graph, node: onnx.NodeProto) -> Array:
    weights = graph.constant(node.input[1])
    assert weights is not None  # noqa: S101 - `weighed` says so
    return weights


def _known(graph: Graph, node: onnx.NodeProto) -> bool:
    weights = _weights(graph, node)
    if node.op_type == "ConvTranspose" or (node.op_type == "Conv" and weights.ndim != 4):
        return False
    if any(a.name == "auto_pad" and a.s not in (b"NOTSET", b"VALID") for a in node.attribute):
        return False
    return bool(_rows(node, weights).shape[2] <= LARGEST)


def _rows(node: onnx.NodeProto, weights: Array) -> Array:
    """Weights as (groups, outputs of a group, inputs of an output)."""
    if node.op_type == "Conv":
        groups = groups_of(node)
        return weights.reshape(groups, weights.shape[0] // groups, -1)
    return (weights if channel_axis(node) == 0 else weights.T)[None]


def _unrows(node: onnx.NodeProto, rows: Array, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Conv" or channel_axis(node) == 0:
        return rows.reshape(shape)
    result: Array = rows[0].T
    return result


def _parts(graph: Graph, nodes: Sequence[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
    """The nodes in parts whose matrices fit together."""
    part: list[onnx.NodeProto] = []
    size = 0
    for node in nodes:
        groups, _, inputs = _rows(node, _weights(graph, node)).shape
        own = groups * inputs * inputs
        if part and size + own > AT_ONCE:
            yield part
            part, size = [], 0
        part.append(node)
        size += own
    if part:
        yield part


def _moments(graph: Graph, nodes: Sequence[onnx.NodeProto], data: Dataset) -> dict[str, Array]:
    """Sum of x x^T over input vectors x of each node: (groups, inputs, inputs), float32."""
    each = max(COLUMNS // max(len(data), 1), 1)
    sums: dict[str, Array] = {}
    tensors = sorted({node.input[0] for node in nodes})
    shapes = {node.name: _weights(graph, node).shape for node in nodes}
    for outputs, _ in runs(graph.model, tensors, data):
        for node in nodes:
            x = _vectors(node, outputs[node.input[0]], shapes[node.name], each)
            sums[node.name] = sums.get(node.name, 0.0) + np.matmul(x, x.transpose(0, 2, 1))
    return sums


def _vectors(node: onnx.NodeProto, values: Array, shape: tuple[int, ...], count: int) -> Array:
    """Input vectors, picked by chance (seeded): (groups, inputs of an output, at most `count`)."""
    if node.op_type != "Conv":
        flat = values.reshape(-1, values.shape[-1])
        return np.ascontiguousarray(flat[_some(len(flat), count)].T)[None]
    with needs("torch"):
        import torch

    given = {a.name: list(a.ints) for a in node.attribute if a.ints}
    top, left, bottom, right = given.get("pads", [0, 0, 0, 0])
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    columns = torch.nn.functional.unfold(
        torch.from_numpy(padded),
        shape[2:],
        dilation=tuple(given.get("dilations", [1, 1])),
        stride=tuple(given.get("strides", [1, 1])),
    ).numpy()
    flat = np.moveaxis(columns, 1, 0).reshape(columns.shape[1], -1)
    picked = flat[:, _some(flat.shape[1], count)]
    return np.ascontiguousarray(picked).reshape(groups_of(node), -1, picked.shape[1])


def _some(values: int, count: int) -> Array:
    """At most `count` of the numbers below `values`: by chance, since images have a width."""
    return np.sort(np.random.default_rng(0).permutation(values)[:count])


def _rounded(rows: Array, moment: Array, levels: Levels) -> Array:
    """Integers for weights in units of their scale: (outputs, inputs) and (inputs, inputs)."""
    root = _root_of_inverse(moment)
    left = rows.T.astype(np.float32)  # inputs first: what is read together lies together
    result = np.empty_like(left)
    size = len(left)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            result[i] = np.clip(np.rint(left[i]), levels.lowest, levels.highest)
            errors[i - start] = (left[i] - result[i]) / root[i, i]
            left[i + 1 : stop] -= root[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= root[start:stop, stop:].T @ errors
    return result.T


def _root_of_inverse(moment: Array) -> Array:
    """The upper triangular U with U^T U = (moment + damping)^-1: an inverted, flipped Cholesky."""
    from scipy.linalg import cholesky, solve_triangular

    size = len(moment)
    damped = moment + np.eye(size, dtype=np.float32) * (DAMPING * np.diag(moment).mean() + 1e-12)
    flipped = cholesky(damped[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
    root: Array = solve_triangular(
        flipped[::-1, ::-1], np.eye(size, dtype=np.float32), lower=False, check_finite=False
    )
    return root
