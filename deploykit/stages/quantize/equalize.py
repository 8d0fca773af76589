"""The same function with ranges that are easier to round: scale moved from channels to weights.

Each channel of an activation is divided by a scale, and the weights that read it are multiplied by
it. The division goes into the constants of the node that makes the activation, through functions f
with f(x / s) = f(x) / s such as Relu; before a matrix product, where none can take it, into a Mul
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from deploykit.formats.onnx_graph import (
    COMPUTE,
    Graph,
    channel_axis,
    groups_of,
    weighed,
    with_constants,
)
from deploykit.stages.quantize.channels import Channels
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""f(x / s) = f(x) / s for s > 0, channel by channel."""
SWEEPS = 3
"""Over all pairs of layers: each changes its neighbours."""
MOST = 100.0
"""No scale is further than this from the middle one: channels that are dead stay harmless."""

Place = tuple[str, int, int]
"""A constant: node, input, and how many axes lie behind the one that counts channels."""


def cross_layer(graph: Graph) -> Graph | None:
    """Give the two layers on each side of an activation equal ranges of weights.

    s = sqrt(r1 / r2), of the largest weights that make and that read a channel: Nagel et al. 2019,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1. None
    where no two layers are joined by a function that lets a scale through.
    """
    edit = _Edit(graph)
    for _ in range(SWEEPS):
        for reading in _readings(graph):
            source = reading.places[0] if reading.places else None
            if source is None or graph.nodes[source[0]].op_type not in COMPUTE:
                continue
            made = _largest(edit.get(source), edit.get(source).ndim - 1 - source[2])
            edit.move(reading, np.sqrt(made / np.maximum(edit.reading(reading), 1e-12)))
    return edit.done()


def smooth(graph: Graph, channels: Mapping[str, Channels], strength: float = 0.5) -> Graph | None:
    """Move outlier channels of activations, by the node that reads them, into its weights.

    `strength` is alpha, the share of an activation's range that moves:
    s = max|x| ** alpha / max|w| ** (1 - alpha): Xiao et al. 2023, "SmoothQuant", equation 4. None
    where no activation takes it.
    """
    edit = _Edit(graph)
    for reading in _readings(graph):
        if reading.places or reading.product:
            seen, weights = channels[reading.nodes[0].name].largest, edit.reading(reading)
            edit.move(reading, seen**strength / np.maximum(weights, 1e-12) ** (1 - strength))
    return edit.done()


@dataclass(frozen=True)
class _Reading:
    """An activation, and the nodes that multiply its channels by constant weights."""

    tensor: str
    nodes: tuple[onnx.NodeProto, ...]
    places: tuple[Place, ...]
    """Constants that divide the activation, those of the node furthest up first; or none."""
    product: bool
    """The nodes are matrix products, whose channels are on the last axis."""


def _readings(graph: Graph) -> Iterator[_Reading]:
    found: dict[tuple[str, bool], list[onnx.NodeProto]] = {}
    for node in weighed(graph):
        found.setdefault((node.input[0], node.op_type in ("MatMul", "Gemm")), []).append(node)
    for (tensor, product), nodes in found.items():
        own = tensor not in graph.outputs and tensor not in graph.captured
        uses = sum(list(node.input).count(tensor) for node in graph.consumers[tensor])
        whole = own and uses == len(nodes)  # a Gemm may add it too
        weights = graph.constant(nodes[0].input[1])
        assert weights is not None  # noqa: S101 - `weighed` says so
        tail = 0 if product else weights.ndim - 2
        places = _places(graph, tensor, tail) if whole else None
        yield _Reading(tensor, tuple(nodes), tuple(places or ()), product)


def _places(graph: Graph, tensor: str, tail: int) -> list[Place] | None:
    """The constants that divide a tensor by channel when they are divided, or None."""
    node = graph.producers.get(tensor)
    if node is None:
        return None
    match node.op_type:
        case "Conv" | "ConvTranspose" | "MatMul" | "Gemm":
            found = _weights(graph, node, tail)
        case "LayerNormalization" if tail == 0:
            numbers = range(1, len(node.input))
            found = _all_constant(graph, node, [(node.name, i, 0) for i in numbers])
        case name if name in HOMOGENEOUS and (tail or not name.endswith("Pool")):
            found = _upstream(graph, node.input[0], tail)
        case "Add" | "Mul":
            found = _beside(graph, node, tail)
        case _:
            found = None
    return found


def _beside(graph: Graph, node: onnx.NodeProto, tail: int) -> list[Place] | None:
    """The constant of a Mul, or that of an Add with what divides its other operand."""
    side = next((i for i, name in enumerate(node.input) if name in graph.constants), None)
    if side is None:
        return None
    own = _all_constant(graph, node, [(node.name, side, tail)])
    if own is None or node.op_type == "Mul":
        return own
    above = _upstream(graph, node.input[1 - side], tail)
    return above and [*above, *own]


def _upstream(graph: Graph, tensor: str, tail: int) -> list[Place] | None:
    return _places(graph, tensor, tail) if graph.only_consumer(tensor) is not None else None


def _weights(graph: Graph, node: onnx.NodeProto, tail: int) -> list[Place] | None:
    """Weights and bias of a compute node whose output channels lie before `tail` axes."""
    weights = graph.constant(node.input[1])
    convolution = node.op_type.startswith("Conv")
    if weights is None or (weights.ndim < 3 if convolution else weights.ndim != 2):
        return None
    if tail != (weights.ndim - 2 if convolution else 0):
        return None
    if node.op_type == "ConvTranspose" and groups_of(node) > 1:
        return None
    places = [(node.name, 1, weights.ndim - 1 - channel_axis(node) % weights.ndim)]
    if len(node.input) > 2 and node.input[2]:
        places.append((node.name, 2, 0))
    return _all_constant(graph, node, places)


def _all_constant(graph: Graph, node: onnx.NodeProto, places: list[Place]) -> list[Place] | None:
    constant = all(graph.constant(node.input[index]) is not None for _, index, _ in places)
    return places if constant else None


def _largest(values: Array, axis: int) -> Array:
    """The largest magnitude along all other axes."""
    result: Array = np.abs(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)).max(axis=1)
    return result.astype(np.float64)


def _by_input(node: onnx.NodeProto, weights: Array) -> Array:
    """A view of weights with their input channels on the first two axes: (groups, channels, ...).

    A convolution has weights of shape (outputs, channels of a group, ...).
    """
    if node.op_type == "Conv":
        groups = groups_of(node)
        split = weights.reshape(groups, weights.shape[0] // groups, *weights.shape[1:])
        inner: Array = np.moveaxis(split, 2, 1)
        return inner
    first = node.op_type == "ConvTranspose" or channel_axis(node) % weights.ndim == 1
    outer: Array = weights if first else np.moveaxis(weights, 1, 0)
    return outer.reshape(1, *outer.shape) if first else outer[np.newaxis, :]


@dataclass
class _Edit:
    """Constants of a graph on their way to new values; the graph stays as it is."""

    graph: Graph
    values: dict[tuple[str, int], Array] = field(default_factory=dict)
    moved: set[tuple[str, int]] = field(default_factory=set)
    scales: dict[tuple[str, bool], Array] = field(default_factory=dict)
    """Of each activation, over all moves."""
    divided: dict[str, tuple[_Reading, Array]] = field(default_factory=dict)
    """Activations that get a Mul of their own."""

    def get(self, place: tuple[str, int, int]) -> Array:
        name, index, _ = place
        if (name, index) not in self.values:
            value = self.graph.constant(self.graph.nodes[name].input[index])
            assert value is not None  # noqa: S101 - `_all_constant` and `weighed` say so
            self.values[name, index] = value.astype(np.float64)
        return self.values[name, index]

    def reading(self, reading: _Reading) -> Array:
        """The largest weight that reads each channel."""
        found = [_by_input(node, self.get((node.name, 1, 0))) for node in reading.nodes]
        flat = [np.abs(w.reshape(w.shape[0] * w.shape[1], -1)).max(axis=1) for w in found]
        largest: Array = np.max(np.stack(flat), axis=0)
        return largest

    def move(self, reading: _Reading, scale: Array) -> None:
        """Divide the activation by the scale of each channel, multiply what reads it."""
        usable = scale > 0
        if not usable.any():
            return
        key = reading.tensor, reading.product
        before = self.scales.get(key, np.ones(1))
        whole = before * scale
        middle = np.exp(np.mean(np.log(whole[usable])))
        whole = np.clip(np.where(usable, whole, middle), middle / MOST, middle * MOST)
        self.scales[key], scale = whole, whole / before
        for name, index, tail in reading.places:
            divided = self.get((name, index, tail)) / scale.reshape(-1, *[1] * tail)
            self.values[name, index] = divided
            self.moved.add((name, index))
        if not reading.places:
            self.divided[reading.tensor] = reading, scale
        for node in reading.nodes:
            weights = self.get((node.name, 1, 0)).copy()
            view = _by_input(node, weights)
            view *= scale.reshape(*view.shape[:2], *[1] * (view.ndim - 2))
            self.values[node.name, 1] = weights
            self.moved.add((node.name, 1))

    def done(self) -> Graph | None:
        """A new graph with the new values; None where nothing moved."""
        if not self.moved:
            return None
        graph = with_constants(self.graph, {key: self.values[key] for key in self.moved})
        shapes = dict(graph.shapes)
        for tensor, (reading, scale) in self.divided.items():
            result = _insert(Graph(graph.model), tensor, reading, scale)
            shapes |= {result: shapes[tensor]} if tensor in shapes else {}
        return replace(graph, shapes=shapes)


def _insert(graph: Graph, tensor: str, reading: _Reading, scale: Array) -> str:
    """Divide the activation by a Mul before the nodes that read it, in place; what it is then."""
    import onnx

    model, tag = graph.model, ""
    while {f"{tensor}_{end}{tag}" for end in ("smoothing", "smooth", "Smooth")} & graph.names:
        tag += "_"
    factor, result = f"{tensor}_smoothing{tag}", f"{tensor}_smooth{tag}"
    inverse = (1 / scale).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(inverse, factor))
    names = {node.name for node in reading.nodes}
    readers = [i for i, node in enumerate(model.graph.node) if node.name in names]
    node = onnx.helper.make_node("Mul", [tensor, factor], [result], f"{tensor}_Smooth{tag}")
    for number in readers:
        model.graph.node[number].input[0] = result
    model.graph.node.insert(min(readers), node)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    known = next(value for value in values if value.name == tensor)  # `weighed` asks for it
    model.graph.value_info.add(name=result, type=known.type)
    return result
