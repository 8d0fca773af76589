"""Where Q/DQ pairs go: which nodes compute on integers, and which tensors they read and write."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import UsageError, did_you_mean
from deploykit.formats.onnx_graph import COMPUTE, Graph, channel_axis, groups_of, matches, modules
from deploykit.stages.quantize import blocks, tables
from deploykit.stages.quantize.presets import TABLES, Preset

if TYPE_CHECKING:
    import onnx

FUSED = frozenset({"Relu", "Clip"})
"""Activation functions that runtimes fuse into the node before them: the pair goes behind."""
MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Split",
    "DepthToSpace", "SpaceToDepth",
})  # fmt: skip
"""They pass values on unchanged: what comes out keeps the grid of what went in."""
FLOAT_RESULTS = frozenset({"MatMul", "Gemm"})
"""ONNX Runtime's kernels for these can read integers and write float."""


@dataclass
class Plan:
    """What to quantize. Tensors are named as in the float graph."""

    nodes: dict[str, str] = field(default_factory=dict)
    """Node name to its part: "integer", "fused" into the node before it, "moves" integers, or looks
    rows up in a "table" of integers."""
    written: set[str] = field(default_factory=set)
    """Activations that exist as integers only: all readers get the dequantized ones."""
    read: dict[str, set[str]] = field(default_factory=dict)
    """Other activations that the named nodes read dequantized."""
    weights: dict[tuple[str, int], int | None] = field(default_factory=dict)
    """(node, input) of constant operands to their channel axis; None for one scale in all."""
    biases: set[str] = field(default_factory=set)
    """Nodes whose third input is a constant bias."""
    same: dict[str, str] = field(default_factory=dict)
    """Tensor behind a move to the tensor whose grid it shares."""

    @property
    def tensors(self) -> set[str]:
        """Activations that need a grid of their own."""
        return (self.written | set(self.read)) - set(self.same)

    def root(self, tensor: str) -> str:
        """The tensor whose grid this one has."""
        while tensor in self.same:
            tensor = self.same[tensor]
        return tensor


def chosen(
    graph: Graph,
    op_types: Collection[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the nodes of these types that the patterns take in and do not leave out.

    A pattern is for names of nodes and of the modules they are in.

    Raises UsageError: a pattern matches no node.
    """
    for pattern in (*include, *exclude):
        if not any(matches(node, pattern) for node in graph.nodes.values()):
            known = {m: None for node in graph.nodes.values() for m in modules(node)}
            raise UsageError(
                f"no node or module matches {pattern!r}",
                hint=did_you_mean(pattern, [*graph.nodes, *known]),
            )
    return tuple(
        name
        for name, node in graph.nodes.items()
        if node.op_type in op_types
        and (not include or any(matches(node, p) for p in include))
        and not any(matches(node, p) for p in exclude)
    )


def plan(
    graph: Graph, names: Collection[str], preset: Preset, *, barred: Collection[str] = ()
) -> Plan:
    """Place pairs around the named nodes as the target wants them.

    A node stays in float if a tensor that it reads or writes is no float32 activation or is
    `barred` (it holds masks, which no range can have beside ordinary values).
    """
    made = Plan()
    for name in names:
        if unfit(graph, name, barred, preset) is not None:
            continue
        if graph.nodes[name].op_type in TABLES:
            made.nodes[name] = "table"
        elif preset.activation is None:
            made.nodes[name] = "integer"
        else:
            _take(graph, graph.nodes[name], preset, made)
    if preset.outputs:
        _pass_on(graph, made, barred)
    return made


def unfit(graph: Graph, name: str, barred: Collection[str], preset: Preset) -> str | None:
    """Why a node cannot be quantized, or None."""
    node = graph.nodes[name]
    if node.op_type in TABLES:
        return tables.unfit(graph, node) if preset.tables else "integer tables are for CPUs"
    if preset.activation is None:
        return blocks.unfit(graph, node)
    return _no_integers(graph, node, barred, preset)


def _no_integers(
    graph: Graph, node: onnx.NodeProto, barred: Collection[str], preset: Preset
) -> str | None:
    """Why a node cannot read pairs, or None."""
    if preset.outputs and node.op_type not in COMPUTE and _result(graph, node) in graph.outputs:
        return "an output of the model is not worth rounding"
    activations = [n for n in _operands(node) if n not in graph.constants]
    if masks := [n for n in (*activations, node.output[0]) if n in barred]:
        return f"{masks[0]!r} holds masks or infinite values"
    if not activations:
        return "it reads constants only"
    odd = [n for n in (*activations, node.output[0]) if n not in graph.floats]
    if odd:
        return f"{odd[0]!r} is not known to be float32"
    if not preset.depthwise and _is_depthwise(graph, node):
        return "a depthwise convolution on integers makes the engine larger"
    return _unfit_constant(graph, node)


def _is_depthwise(graph: Graph, node: onnx.NodeProto) -> bool:
    weights = graph.constants.get(node.input[1]) if groups_of(node) > 1 else None
    return weights is not None and weights.dims[1] == 1


def _unfit_constant(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Why the constants that a node reads cannot be integers, or None."""
    constants = [graph.constant(n) for n in _operands(node) if n in graph.constants]
    most = float(np.finfo(np.float32).max) if node.op_type in COMPUTE else tables.HUGE
    for value in constants:
        if value is None:
            return "a constant is not float32"
        if not np.abs(value).max(initial=0) <= most:  # NaN too
            return "a constant holds masks or infinite values"
    return None


def _operands(node: onnx.NodeProto) -> list[str]:
    """Inputs that carry values: not the bias, nor shapes and bounds."""
    if node.op_type in ("Add", "Mul", "Concat"):
        return [name for name in node.input if name]
    return [name for name in node.input[: 2 if node.op_type in COMPUTE else 1] if name]


def _take(graph: Graph, node: onnx.NodeProto, preset: Preset, made: Plan) -> None:
    operands = list(enumerate(_operands(node)))
    if not preset.outputs and not any(_joins_as_integer(graph, node, i) for i, _ in operands):
        return
    made.nodes[node.name] = "integer"
    for index, name in operands:
        if name not in graph.constants:
            if preset.outputs or _joins_as_integer(graph, node, index):
                made.read.setdefault(name, set()).add(node.name)
        elif node.op_type in COMPUTE:
            axis = channel_axis(node) if index == 1 and _per_channel(graph, node) else None
            made.weights[node.name, index] = axis
        elif preset.outputs:
            made.weights[node.name, index] = None
    if _has_plain_bias(graph, node, made):
        made.biases.add(node.name)
    if preset.outputs and node.op_type not in FLOAT_RESULTS:
        result = _result(graph, node)
        made.written.add(result)
        if result != node.output[0]:
            made.nodes[graph.producers[result].name] = "fused"


def _has_plain_bias(graph: Graph, node: onnx.NodeProto, made: Plan) -> bool:
    """Whether there is a constant bias with one value for each channel of constant weights."""
    if len(node.input) < 3 or (node.name, 1) not in made.weights:
        return False
    if (node.name, 0) in made.weights:
        return False
    bias = graph.constant(node.input[2])
    dims = graph.constants[node.input[1]].dims
    return bias is not None and bias.shape == (dims[channel_axis(node)],)


def _per_channel(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether the weights have an axis of output channels that each target takes a scale for."""
    dims = graph.constants[node.input[1]].dims
    if node.op_type == "ConvTranspose":
        return groups_of(node) == 1
    return len(dims) == 2 or node.op_type == "Conv"


def _joins_as_integer(graph: Graph, node: onnx.NodeProto, index: int) -> bool:
    """Whether a target that fuses adds wants this operand as integers.

    One operand of a residual add stays in float: it is the sum inside the convolution into which
    the add is fused.
    """
    if node.op_type != "Add":
        return True
    fusing = [
        number
        for number, name in enumerate(node.input)
        if name in graph.producers
        and graph.producers[name].op_type in COMPUTE
        and graph.only_consumer(name) is not None
    ]
    return bool(fusing) and index != fusing[0]


def _result(graph: Graph, node: onnx.NodeProto) -> str:
    """The tensor behind a node and the activation function that is fused into it."""
    result = node.output[0]
    follower = graph.only_consumer(result)
    if follower is None or follower.op_type not in FUSED or follower.input[0] != result:
        return str(result)
    return str(follower.output[0])


def _pass_on(graph: Graph, made: Plan, barred: Collection[str]) -> None:
    """Let moves between two integer tensors move integers, and give both the same grid."""
    for name, node in graph.nodes.items():
        source = node.input[0] if node.input else ""
        if node.op_type not in MOVES or source not in made.written:
            continue
        results = [out for out in node.output if out]
        wanted = any(out in made.read for out in results)
        if wanted and all(out in graph.floats and out not in barred for out in results):
            made.nodes[name] = "moves"
            for out in results:
                made.written.add(out)
                made.same[out] = source
    for tensor in made.written:
        made.read.pop(tensor, None)
