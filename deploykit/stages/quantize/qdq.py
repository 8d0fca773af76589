"""Write a plan into a graph: explicit QuantizeLinear and DequantizeLinear pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.formats.onnx_graph import COMPUTE, Graph, subgraph_nodes
from deploykit.formats.onnx_module import LARGEST_BIAS
from deploykit.stages.quantize import blocks, tables
from deploykit.stages.quantize.levels import Grid, Levels
from deploykit.stages.quantize.placement import Plan
from deploykit.stages.quantize.presets import Preset
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

SMALLEST_SHARE = 1e-6
"""A channel's scale as a share of the largest one, at least."""


def write(
    graph: Graph,
    made: Plan,
    grids: Mapping[str, Grid],
    preset: Preset,
    *,
    integers: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """A copy of the model with the pairs of the plan; `grids` are those of `made.tensors`.

    `integers` are weights in levels by node, where they are not to be rounded to nearest.
    """
    writer = _Writer(graph, made, grids, preset, integers)
    nodes = writer.nodes()
    model = _without_weights(graph.model)
    model.graph.node.extend([*writer.first, *nodes])
    used = {name for node in nodes for name in node.input} | {
        name for node in writer.first for name in node.input
    }
    used |= graph.captured | graph.outputs
    model.graph.initializer.extend(t for n, t in graph.constants.items() if n in used)
    model.graph.initializer.extend(writer.added.values())
    return model


def scales(graph: Graph, made: Plan, grids: Mapping[str, Grid], preset: Preset) -> dict[str, Array]:
    """The scale of each output channel of the constant weights, by compute node."""
    writer = _Writer(graph, made, grids, preset)
    return {
        name: writer.weight_scale(name, index, list(graph.nodes[name].input))
        for name, index in made.weights
        if index == 1 and graph.nodes[name].op_type in COMPUTE
    }


def errors(
    graph: Graph,
    made: Plan,
    scales: Mapping[str, Array],
    integers: Mapping[str, Array],
    preset: Preset,
) -> dict[str, Array]:
    """Quantized weights less the true ones, by compute node; see `scales` and `write`."""
    found: dict[str, Array] = {}
    for name, scale in scales.items():
        values = graph.constant(graph.nodes[name].input[1])
        assert values is not None  # noqa: S101 - `placement.unfit` has checked it
        axis = made.weights[name, 1]
        levels = integers.get(name)
        if levels is None:
            levels = integer_weights(values, scale, axis, preset.weight_levels)
        found[name] = levels * _along(scale, axis, values.ndim) - values
    return found


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything of a model but its nodes and initializers, without copying those."""
    import onnx

    bare = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        setattr(bare, name, getattr(model, name))
    used = {node.domain for node in model.graph.node}
    used |= {inner.domain for node in model.graph.node for inner in subgraph_nodes(node)}
    used |= {node.domain for function in model.functions for node in function.node}
    bare.opset_import.extend(o for o in model.opset_import if o.domain in used | {"", "ai.onnx"})
    bare.functions.extend(model.functions)
    bare.metadata_props.extend(model.metadata_props)
    bare.graph.name = model.graph.name or "graph"
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    bare.graph.value_info.extend(model.graph.value_info)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    return bare


class _Writer:
    """Nodes and constants of the quantized graph, in the making."""

    def __init__(
        self,
        graph: Graph,
        made: Plan,
        grids: Mapping[str, Grid],
        preset: Preset,
        integers: Mapping[str, Array] | None = None,
    ) -> None:
        self.graph, self.plan, self.grids, self.preset = graph, made, grids, preset
        self.integers = integers or {}
        self.first: list[onnx.NodeProto] = []
        """Dequantized constants: they come before all nodes."""
        self.added: dict[str, onnx.TensorProto] = {}
        self._tag = _free_tag(graph)
        self._relus = blocks.relus(graph, made.nodes) if preset.activation is None else set()

    def grid(self, tensor: str) -> Grid:
        return self.grids[self.plan.root(tensor)]

    def nodes(self) -> list[onnx.NodeProto]:
        """All nodes in order, with a pair behind each tensor that wants one."""
        import onnx

        result: list[onnx.NodeProto] = []
        for value in self.graph.model.graph.input:
            result += self._pair(value.name)
        for node in self.graph.nodes.values():
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self._rewire(copy)
            for index, name in enumerate(node.output):
                if name in self.plan.written:
                    copy.output[index] = f"{name}{self._tag}_float"
            looks_up = self.plan.nodes.get(node.name) == "table"
            result += self._lookup(copy) if looks_up else [copy]
            for name in node.output:
                result += self._pair(name)
        return result

    def _pair(self, tensor: str) -> list[onnx.NodeProto]:
        if tensor in self.plan.written:
            return self._quantized(tensor, f"{tensor}{self._tag}_float", tensor)
        if tensor in self.plan.read:
            return self._quantized(tensor, tensor, f"{tensor}{self._tag}_dequantized")
        return []

    def _quantized(self, tensor: str, source: str, target: str) -> list[onnx.NodeProto]:
        import onnx

        grid = self.grid(tensor)
        root = self.plan.root(tensor)
        scale = self._constant(f"{root}{self._tag}_scale", np.array(grid.scale, np.float32))
        zero = self._constant(
            f"{root}{self._tag}_zero_point", np.array(grid.zero_point, grid.levels.dtype)
        )
        integer = f"{tensor}{self._tag}_quantized"
        return [
            onnx.helper.make_node(
                "QuantizeLinear", [source, scale, zero], [integer], f"{tensor}_QuantizeLinear"
            ),
            onnx.helper.make_node(
                "DequantizeLinear", [integer, scale, zero], [target], f"{tensor}_DequantizeLinear"
            ),
        ]

    def _lookup(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Rows of an integer table, in place of those of the float one."""
        table = node.input[0]
        values = self.graph.constant(table)
        assert values is not None  # noqa: S101 - `tables.unfit` has checked it
        integers, scales = tables.quantized(values)
        rows = self._constant(f"{table}{self._tag}_rows_quantized", integers)
        row_scales = self._constant(f"{table}{self._tag}_rows_scale", scales)
        return tables.lookup(node, rows, row_scales, self._tag)

    def _rewire(self, node: onnx.NodeProto) -> None:
        """Let a node read dequantized activations, weights and bias."""
        original = list(node.input)
        if self.preset.activation is None:
            self._rewire_blocks(node)
            return
        for index, name in enumerate(original):
            if node.name in self.plan.read.get(name, ()):
                node.input[index] = f"{name}{self._tag}_dequantized"
            elif (node.name, index) in self.plan.weights:
                node.input[index] = self._weights(node.name, index, original)
        if node.name in self.plan.biases and self.preset.quantize_bias:
            node.input[2] = self._bias(node.name, original)

    def _rewire_blocks(self, node: onnx.NodeProto) -> None:
        """Let a node read weights in blocks, and keep no Relu that would hinder it."""
        if self.plan.nodes.get(node.name) == "integer":
            node.input[1] = self._blocked(node)
        elif node.name in self._relus:
            node.op_type = "Max"
            node.input.append(
                self._constant(f"{node.output[0]}{self._tag}_zero_point", np.zeros((), np.float32))
            )

    def _blocked(self, node: onnx.NodeProto) -> str:
        """Weights in blocks, with the inputs first."""
        tensor = node.input[1]
        values = self.graph.constant(tensor)
        assert values is not None  # noqa: S101 - `blocks.unfit` has checked it
        if blocks.turned(node):
            blocks.turn(node)
            tensor, values = f"{tensor}_turned", values.T
        return self._dequantized(tensor, *blocks.quantized(values), 0, 0)

    def _weights(self, name: str, index: int, inputs: list[str]) -> str:
        axis = self.plan.weights[name, index]
        tensor = inputs[index]
        values = self.graph.constant(tensor)
        assert values is not None  # noqa: S101 - `placement.unfit` has checked it
        if self.graph.nodes[name].op_type not in COMPUTE:
            grid = self.preset.levels.fitted(
                min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            )
            return self._dequantized(
                tensor,
                grid.levels.nearest(values / grid.scale, grid.zero_point).astype(grid.levels.dtype),
                np.array(grid.scale, np.float32),
                grid.zero_point,
            )
        scale = self.weight_scale(name, index, inputs)
        levels = self.preset.weight_levels
        integers = self.integers.get(name) if index == 1 else None
        if integers is None:
            integers = integer_weights(values, scale, axis, levels)
        else:
            tensor = f"{name}_{tensor}"  # rounded for this node's data, not for all that share it
        return self._dequantized(tensor, integers.astype(levels.dtype), scale, 0, axis)

    def weight_scale(self, name: str, index: int, inputs: list[str]) -> Array:
        """One scale a channel, or one for all; wide enough for an int32 bias."""
        axis = self.plan.weights[name, index]
        values = self.graph.constant(inputs[index])
        assert values is not None  # noqa: S101
        scale = weight_scales(values, axis, self.preset.weight_levels)
        if name in self.plan.biases and self.preset.quantize_bias:
            bias = self.graph.constant(inputs[2])
            assert bias is not None  # noqa: S101
            least = np.abs(bias) / (self.grid(inputs[0]).scale * LARGEST_BIAS)
            scale = np.maximum(scale, least if scale.ndim else least.max(initial=0.0))
        return scale.astype(np.float32)

    def _bias(self, name: str, inputs: list[str]) -> str:
        bias = self.graph.constant(inputs[2])
        assert bias is not None  # noqa: S101
        scale = np.float32(self.grid(inputs[0]).scale) * self.weight_scale(name, 1, inputs)
        integers = np.clip(np.rint(bias / scale), -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
        axis = 0 if scale.ndim else None
        return self._dequantized(f"{name}_bias", integers, scale, 0, axis)

    def _dequantized(
        self, tensor: str, integers: Array, scale: Array, zero: int, axis: int | None = None
    ) -> str:
        """Add a constant with its DequantizeLinear, once for equal use; the name of the result."""
        import onnx

        where = "" if axis is None else f"_axis{axis % integers.ndim}"
        base = f"{tensor}{where}"
        ends = (f"{self._tag}_scale", f"{self._tag}_quantized")
        same = [
            onnx.numpy_helper.from_array(np.asarray(array, order="C")).raw_data
            for array in (np.asarray(scale, np.float32), integers)
        ]
        while (others := [self.added.get(base + end) for end in ends])[0] and [
            other and other.raw_data for other in others
        ] != same:
            base += "_"
        target = f"{base}{self._tag}_dequantized"
        if f"{base}{self._tag}_quantized" in self.added:
            return target
        names = [
            self._constant(f"{base}{self._tag}_quantized", integers),
            self._constant(f"{base}{self._tag}_scale", np.asarray(scale, np.float32)),
        ]
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis % integers.ndim}
        if np.ndim(scale) == 2:
            attributes["block_size"] = blocks.BLOCK
        else:
            points = np.full(np.shape(scale), zero, integers.dtype)
            names.append(self._constant(f"{base}{self._tag}_zero_point", points))
        self.first.append(
            onnx.helper.make_node(
                "DequantizeLinear", names, [target], f"{base}_DequantizeLinear", **attributes
            )
        )
        return target

    def _constant(self, name: str, value: Array) -> str:
        import onnx

        if name not in self.added:
            self.added[name] = onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name


def _free_tag(graph: Graph) -> str:
    """What to put into the names of new tensors so that they are new."""
    taken = {*graph.constants, *graph.producers, *graph.captured}
    taken |= {value.name for value in graph.model.graph.input}
    ends = ("_float", "_quantized", "_dequantized", "_scale", "_zero_point", "_rows", "_row_scales")
    tag = ""
    while any(name.endswith(tuple(tag + end for end in ends)) for name in taken):
        tag += "_qdq"
    return tag


def weight_scales(values: Array, axis: int | None, levels: Levels) -> Array:
    """The scale with which the largest magnitude (of each channel) is the highest level."""
    dims = range(values.ndim)
    others = None if axis is None else tuple(i for i in dims if i != axis % values.ndim)
    largest = np.abs(values).max(axis=others).astype(np.float64)
    scale = np.asarray(largest / levels.highest)
    floor = SMALLEST_SHARE * scale.max(initial=0.0)  # dead channels: their products must not vanish
    return np.maximum(scale, floor) if floor > np.finfo(np.float32).tiny else np.ones_like(scale)


def integer_weights(values: Array, scale: Array, axis: int | None, levels: Levels) -> Array:
    """Weights in levels, rounded half to even."""
    return levels.nearest(values / _along(scale, axis, values.ndim))


def _along(scale: Array, axis: int | None, dims: int) -> Array:
    """The scale shaped to multiply weights."""
    shape = [1] * dims
    if axis is not None:
        shape[axis] = -1
    return scale.reshape(shape)
