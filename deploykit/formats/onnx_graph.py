"""A view of an ONNX graph: who makes and who reads each tensor, and what is constant."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.formats import onnx_weights
from deploykit.formats.onnx_macs import RECURRENT, macs
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that hold nearly all multiply-accumulates."""
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter tells the modules of a node."""


@dataclass
class Graph:
    """The main graph of a model whose nodes have names of their own; see `name_nodes`."""

    model: onnx.ModelProto
    folder: Path = Path()
    """Where weights lie that are not in the model."""
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """What tensors measure on a sample, where the model does not say it or leaves it open."""

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """Nodes by name, in the order of the graph."""
        return {node.name: node for node in self.model.graph.node}

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes a tensor."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes of the main graph that read a tensor."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def captured(self) -> set[str]:
        """Tensors that subgraphs may read from outside."""
        return {
            name
            for node in self.model.graph.node
            for inner in subgraph_nodes(node)
            for name in inner.input
        }

    @cached_property
    def names(self) -> set[str]:
        """Of all nodes and tensors, and of what subgraphs read."""
        known = {*self.nodes, *self.constants, *self.producers, *self.captured}
        return known | {value.name for value in self.model.graph.input}

    @cached_property
    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.model.graph.output}

    @cached_property
    def ends(self) -> set[str]:
        """Names of the graph's inputs and outputs."""
        return self.outputs | {value.name for value in self.model.graph.input}

    @cached_property
    def floats(self) -> set[str]:
        """Float32 activations: inputs, outputs and what lies between, as far as types are known."""
        import onnx

        graph = self.model.graph
        known = [*graph.value_info, *graph.input, *graph.output]
        named = {v.name for v in known if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
        return named - set(self.constants)

    def is_float(self, name: str) -> bool:
        """Whether this is a float32 initializer."""
        import onnx

        tensor = self.constants.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT

    def constant(self, name: str) -> Array | None:
        """The value of a float32 initializer, or None; one in another file is mapped, not read."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            return None
        return onnx_weights.array(tensor, self.folder)

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The one reader of a tensor that nothing else needs, or None."""
        readers = self.consumers.get(name, [])
        free = name not in self.outputs and name not in self.captured
        return readers[0] if free and len(readers) == 1 else None


def modules(node: onnx.NodeProto) -> tuple[str, ...]:
    """The PyTorch modules that a node was exported from, outermost first; () where none is told.

    As torch's exporter writes them. A convolution with a folded batch norm has the latter's.
    """
    told = next((p.value for p in node.metadata_props if p.key == SCOPES_KEY), "")
    try:
        scopes = ast.literal_eval(told) if told else []
    except (ValueError, SyntaxError):
        return ()
    return tuple(str(scope) for scope in scopes[:-1] if scope)


def matches(node: onnx.NodeProto, pattern: str) -> bool:
    """Whether a pattern is for a node: for its name, or for a module that it is in."""
    return any(n == pattern or fnmatchcase(n, pattern) for n in (node.name, *modules(node)))


def subgraph_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Nodes inside the branches and bodies of a node, at any depth."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield inner
                yield from subgraph_nodes(inner)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give each node of the main graph a name of its own, in place; names that are stay."""
    given = {node.name for node in model.graph.node}
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            name = f"{node.op_type}_{number}"
            while name in given or name in taken:
                name += "_"
            node.name = name
        taken.add(node.name)


def channel_axis(node: onnx.NodeProto) -> int:
    """The axis of the weights that counts output channels."""
    if node.op_type == "Gemm":
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if turned else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, -1)


def weighed(graph: Graph) -> list[onnx.NodeProto]:
    """Compute nodes that multiply the channels of an activation by constant float32 weights."""
    return [
        node
        for node in graph.nodes.values()
        if node.op_type in COMPUTE
        and node.input[0] in graph.floats
        and (weights := graph.constant(node.input[1])) is not None
        and (weights.ndim > 2 if node.op_type.startswith("Conv") else weights.ndim == 2)
        and not any(a.name == "transA" and a.i for a in node.attribute)
    ]


def input_axis(node: onnx.NodeProto) -> int:
    """The axis of a weighed activation that counts channels."""
    return 1 if node.op_type.startswith("Conv") else -1


def groups_of(node: onnx.NodeProto) -> int:
    """Groups of a convolution; 1 for other nodes."""
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def open_shapes(graph: Graph) -> set[str]:
    """Activations of compute nodes with a dimension that the model leaves open."""
    main = graph.model.graph
    known = {
        value.name
        for value in (*main.value_info, *main.input, *main.output)
        if all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    }
    return {
        name
        for node in graph.nodes.values()
        if node.op_type in (*COMPUTE, *RECURRENT)
        for name in (*node.input[:2], node.output[0])
        if name in graph.floats - known
    }


def multiply_accumulates(model: onnx.ModelProto, graph: Graph) -> dict[str, int]:
    """Multiply-accumulates of each compute node for one sample; 0 where shapes are not known.

    A dimension that is left open is that of the graph's sample, else 1.
    """
    sizes: dict[str, Sequence[int]] = {
        value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    sizes |= graph.shapes
    sizes |= {name: list(tensor.dims) for name, tensor in graph.constants.items()}
    first = next((sizes[v.name] for v in model.graph.input if v.name not in graph.constants), [1])
    batch = max(first[0], 1) if first else 1

    def samples(node: onnx.NodeProto) -> int:
        out = sizes.get(node.output[0])
        return batch if out and out[0] == batch else 1

    return {name: (macs(node, sizes) or 0) // samples(node) for name, node in graph.nodes.items()}


def with_constants(graph: Graph, values: Mapping[tuple[str, int], Array]) -> Graph:
    """A copy of the graph in which (node, input) reads these values, each node its own."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    taken = set(graph.names)
    nodes = {node.name: node for node in model.graph.node}
    for (name, index), value in values.items():
        new = f"{name}_constant{index}"
        while new in taken:
            new += "_"
        taken.add(new)
        inputs = nodes[name].input
        inputs.extend([""] * (index + 1 - len(inputs)))
        inputs[index] = new
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), new))
    drop_unused(model)
    return replace(graph, model=model)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove the initializers and Constant nodes that nothing reads, in place."""
    nodes = list(model.graph.node)
    read = {name for node in nodes for name in node.input}
    read |= {name for node in nodes for inner in subgraph_nodes(node) for name in inner.input}
    read |= {value.name for value in model.graph.output}
    for kept, items in (
        ([t for t in model.graph.initializer if t.name in read], model.graph.initializer),
        ([n for n in nodes if n.op_type != "Constant" or n.output[0] in read], model.graph.node),
    ):
        if len(kept) < len(items):
            copies = [type(item).FromString(item.SerializeToString()) for item in kept]
            del items[:]
            items.extend(copies)
