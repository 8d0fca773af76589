"""The channels of the activations that constant weights multiply, on a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploykit.dataset import Dataset
from deploykit.formats.onnx_graph import Graph, input_axis, weighed
from deploykit.stages.quantize.calibration import runs
from deploykit.values import Array

FEW = 32
"""Samples that corrections look at."""


@dataclass(frozen=True)
class Channels:
    """Of each channel of a tensor over samples and positions: float64, shape (channels,)."""

    mean: Array
    largest: Array
    """Largest magnitude."""


def observe_channels(graph: Graph, data: Dataset) -> Mapping[str, Channels]:
    """What each weighed node reads, by the node's name, on the first FEW samples."""
    read = {node.name: (node.input[0], input_axis(node)) for node in weighed(graph)}
    if not read:
        return {}
    keys = sorted(set(read.values()))
    means = {key: np.zeros(1) for key in keys}
    largest = {key: np.zeros(1) for key in keys}
    count = 0
    for outputs, _ in runs(graph.model, sorted({name for name, _ in keys}), data.first(FEW)):
        count += 1
        for name, axis in keys:
            values = outputs[name]
            rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
            means[name, axis] = means[name, axis] + rows.mean(axis=1, dtype=np.float64)
            largest[name, axis] = np.maximum(largest[name, axis], np.abs(rows).max(axis=1))
    return {node: Channels(means[key] / count, largest[key]) for node, key in read.items()}
