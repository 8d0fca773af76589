"""The channels of the activations that constant weights multiply, on a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploykit.dataset import Dataset
from deploykit.stages.quantize.calibration import runs
from deploykit.stages.quantize.graph import Graph, input_axis, weighed
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
    """The channels by tensor, on the first FEW samples."""
    axes = {node.input[0]: input_axis(node) for node in weighed(graph)}
    means = {name: np.zeros(1) for name in axes}
    largest = {name: np.zeros(1) for name in axes}
    count = 0
    for outputs, _ in runs(graph.model, sorted(axes), data.first(FEW)):
        count += 1
        for name, values in outputs.items():
            rows = np.moveaxis(values, axes[name], 0).reshape(values.shape[axes[name]], -1)
            means[name] = means[name] + rows.mean(axis=1, dtype=np.float64)
            largest[name] = np.maximum(largest[name], np.abs(rows).max(axis=1))
    return {name: Channels(means[name] / count, largest[name]) for name in axes}
